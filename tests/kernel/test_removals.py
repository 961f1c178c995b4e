"""Arenas with deferred pages: removal of parts of the memory, and second mappings (S3, S8, S10)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pageferry
from pageferry.workloads.arena.arena import memory_file
from tests.kernel.moving import environment
from tests.kernel.programs import Program
from tests.kernel.test_cold_store import pageferry as command
from tests.kernel.test_cold_store import reclaim, record

pytestmark = pytest.mark.usefixtures("root")

PAGE = 4096
PAGES = 4096
OWNER = str(Path(__file__).with_name("removing_owner.py"))
MEMORY = ["tmpfs", "memfd"]


@contextmanager
def owner(*arguments: object, memory: str = "tmpfs") -> Iterator[Program]:
    with Program(OWNER, "cold", *map(str, arguments), env={**environment(None), "MEMORY": memory}) as program:
        program.json()
        yield program


@contextmanager
def stored() -> Iterator[Program]:
    """Yield a program with an arena from which `reclaim` has evicted pages to a cold store."""
    with owner(PAGES) as program:
        reclaim()
        assert record() is not None
        yield program


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "image"
    with pageferry.Arena(PAGES * PAGE) as arena:
        view = memoryview(arena).cast("Q")
        for page in range(PAGES):
            view[page * 512 : (page + 1) * 512] = memoryview((page + 1).to_bytes(8, "little") * 512).cast("Q")
        pageferry.checkpoint(arena, path)
    return path


@contextmanager
def restored(image: Path, memory: str) -> Iterator[Program]:
    with owner(PAGES, image, memory=memory) as program:
        yield program


def ask(program: Program, call: str, first: int = 0, count: int = 0) -> list[list[int]]:
    program.say(f"{call} {first} {count}")
    answer: list[list[int]] = program.json()
    return answer


def zeros(first: int, count: int) -> list[list[int]]:
    return [[page, 0] for page in range(first, first + count)]


def check_removals(program: Program) -> None:
    assert ask(program, "unmap", 0, 1024) == []
    assert ask(program, "remove", 1024, 512) == zeros(1024, 512)
    assert ask(program, "unmap", 2048, 100) == zeros(1024, 512)
    assert ask(program, "remove", 3000, 1) == zeros(1024, 512) + zeros(3000, 1)
    assert ask(program, "unmap", 1000, 600) == zeros(1024, 512) + zeros(3000, 1)


def test_arena_in_cold_store_keeps_unmapped_and_loses_removed_pages() -> None:
    with stored() as program:
        check_removals(program)
        assert command("large-pages", "cold", "--undo").returncode in (0, 2)
        assert ask(program, "look") == zeros(1024, 512) + zeros(3000, 1)


@pytest.mark.parametrize("memory", MEMORY)
def test_restored_arena_keeps_unmapped_and_loses_removed_pages(image: Path, memory: str) -> None:
    with restored(image, memory) as program:
        check_removals(program)


def test_removals_in_sequence_are_distinguished(image: Path) -> None:
    with restored(image, "tmpfs") as program:
        # The program accesses no page between the calls: all pages stay deferred until the program makes its reply.
        calls = [(("unmap", "remove")[first % 3 == 0], first) for first in range(PAGES)]
        program.say(";".join(f"{call} {first} 1" for call, first in calls))
        assert program.json() == [[first, 0] for call, first in calls if call == "remove"]


def test_second_mapping_of_arena_in_cold_store_is_complete_and_ends_the_store() -> None:
    with stored() as program:
        assert ask(program, "again") == []
        assert record() is None
        refused = command("large-pages", "cold", "--reclaim", "store", "--sample", "100%", "--budget", "0")
        assert refused.returncode == 3
        assert "fileno()" in refused.stderr
        assert ask(program, "again") == []


def test_hole_punched_by_descriptor_of_arena_in_cold_store_stays_a_hole() -> None:
    with stored() as program:
        assert ask(program, "punch", 10, 700) == zeros(10, 700)


@pytest.mark.parametrize("memory", MEMORY)
def test_second_mapping_of_restored_arena_is_complete(image: Path, memory: str) -> None:
    with restored(image, memory) as program:
        assert ask(program, "again") == []
        assert ask(program, "punch", 10, 700) == zeros(10, 700)


def test_descriptor_taken_before_a_reclaim_refuses_it() -> None:
    with owner(PAGES) as program:
        assert ask(program, "again") == []
        refused = command("large-pages", "cold", "--reclaim", "store", "--sample", "100%", "--budget", "0")
        assert refused.returncode == 3
        assert "reclaim swap" in refused.stderr


def test_arena_over_a_file_of_the_program_counts_as_handed_out(tmp_path: Path) -> None:
    file, _ = memory_file(PAGES * PAGE)
    with pageferry.Arena.from_file(file, PAGES * PAGE, "cold", on_pause=lambda: None, paused=False):
        os.close(file)
        refused = command("large-pages", "cold", "--reclaim", "store", "--sample", "100%", "--budget", "0")
        assert refused.returncode == 3
        assert "fileno()" in refused.stderr
