"""Named arenas that the program drops without closing them: their memory and names are released, with a warning."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import pageferry
from pageferry.host import proc
from pageferry.host.registry import ArenaEntry, Registry
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.arena.control_socket.client import RemoteArena
from tests.kernel.images import Maker
from tests.kernel.programs import wait_until

MIB = 1 << 20


def nothing() -> None:
    """Do nothing; used as a callback."""


def mappings_of(file: tuple[int, int]) -> int:
    """Return the number of mappings of a file in this process."""
    return [(mapping.device, mapping.inode) for mapping in proc.file_mappings(os.getpid())].count(file)


def file_of(arena: Arena) -> tuple[int, int]:
    """Return the device and inode numbers of the memory file. Files of two arenas can have the same inode number."""
    status = os.fstat(arena.descriptor)
    return status.st_dev, status.st_ino


@contextmanager
def warned(count: int = 1) -> Iterator[None]:
    """Check that `count` arenas are reported as dropped. Keep only texts, because a warning refers to its arena."""
    found: list[str] = []

    def note(message: Warning | str, category: type[Warning], *_: object) -> None:
        found.append(f"{category.__name__}: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        yield
    ours = [text for text in found if text.startswith("ResourceWarning: unclosed <Arena dropped")]
    assert len(ours) == count, found


def is_free(file: tuple[int, int]) -> None:
    wait_until(lambda: mappings_of(file) == 0, "the removal of all mappings")
    wait_until(lambda: Registry().entries() == {}, "the release of the name")


def test_dropped_arena_is_freed_with_a_warning() -> None:
    arena = Arena(4 * MIB, "dropped", on_pause=nothing)
    file = file_of(arena)
    memoryview(arena)[0] = 1
    assert mappings_of(file) == 1
    with warned():
        del arena
    is_free(file)
    Arena(MIB, "dropped", on_pause=nothing).close()


def test_arena_in_a_cycle_with_its_callbacks_is_freed_by_the_collector() -> None:
    class Holder:
        def __init__(self) -> None:
            self.arena = Arena(4 * MIB, "dropped", on_pause=self.pause)

        def pause(self) -> None:
            """Do nothing. As a bound method, this callback refers to the holder."""

    file = file_of(Holder().arena)
    with warned():
        gc.collect()
    is_free(file)


def test_collecting_arena_does_not_wait_for_run_directory_lock() -> None:
    arena = Arena(4 * MIB, "dropped", on_pause=nothing)
    file = file_of(arena)
    with warned(), Registry().locked():
        del arena
    is_free(file)


def test_views_keep_a_named_arena() -> None:
    arena = Arena(4 * MIB, "dropped", on_pause=nothing)
    file = file_of(arena)
    words = np.frombuffer(arena, dtype=np.uint8)  # type: ignore[call-overload]
    with warned(0):
        del arena
        gc.collect()
    assert list(Registry().entries()) == ["dropped"]
    words[5] = 1
    with warned():
        del words
    is_free(file)


def test_client_keeps_the_arena_that_it_has_paused() -> None:
    arena = Arena(4 * MIB, "dropped", on_pause=nothing)
    file = file_of(arena)
    entry = Registry().lookup("dropped")
    assert isinstance(entry, ArenaEntry)

    async def drop() -> None:
        nonlocal arena
        client = await RemoteArena.connect(entry.control_socket)
        await client.pause()
        with warned(0):
            del arena
            gc.collect()
        assert not await client.running()
        assert await client.save_state() == b""
        client.close()

    with warned():
        asyncio.run(drop())
        wait_until(lambda: mappings_of(file) == 0, "the removal of all mappings")
    is_free(file)


def test_dropped_arena_of_an_image_is_freed_while_pages_are_deferred(tmp_path: Path) -> None:
    path = Maker(2048).write(tmp_path / "image")
    arena = pageferry.restore(path, "dropped", prefetch=False, on_pause=nothing)
    file = file_of(arena)
    assert arena.deferred > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del arena
        gc.collect()
    is_free(file)


@pytest.mark.parametrize("end", ["arena.close()", "pass"], ids=["closed", "end-of-program"])
def test_closed_arena_causes_no_warning(end: str) -> None:
    program = f"import pageferry; arena = pageferry.Arena(4096, 'dropped', on_pause=lambda: None); {end}"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert "ResourceWarning" not in done.stderr
    assert Registry().entries() == {}


def test_forked_child_leaves_the_name_to_its_parent() -> None:
    arena = Arena(4 * MIB, "dropped", on_pause=nothing)
    child = os.fork()
    if child == 0:
        del arena
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert list(Registry().entries()) == ["dropped"]
    arena.close()
