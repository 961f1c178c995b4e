"""Arenas that have moved refuse writes. Failed operations release all resources, even if a caller keeps the error."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import pageferry
from pageferry.errors import MigrationError, OutcomeUnknown, PageferryError, WorkloadError
from pageferry.host import proc
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.lifecycle import Status
from tests.kernel import moving
from tests.kernel.programs import Program

MIB = 1 << 20
RECEIVER = """
import asyncio, os, sys, pageferry
def die(*_): os.kill(os.getpid(), 9)
async def main():
    point = sys.argv[1] if len(sys.argv) > 1 else ""
    await pageferry.receive_async("127.0.0.1:0", listening=lambda address: print(address, flush=True),
        state=(bytes, die if point == "load" else bytes), on_resume=die if point == "resume" else None)
asyncio.run(main())
"""
WRITER = f"""
import asyncio, multiprocessing, os, subprocess, sys
import numpy, pageferry
receiver = subprocess.Popen([sys.executable, "-c", {RECEIVER!r}], stdout=subprocess.PIPE, text=True)
arena = pageferry.Arena(1 << 20)
words = numpy.frombuffer(arena, numpy.int64)
words[:] = 7
pageferry.migrate(arena, receiver.stdout.readline().strip())
print(arena.status, words[100], flush=True)
words[100] = 8
print("the write has succeeded", flush=True)
"""

pytestmark = pytest.mark.usefixtures("root")


@contextmanager
def receiver(point: str = "") -> Iterator[str]:
    """Yield the address of a process that receives an arena. `point`: callback that kills the process, if any."""
    with Program("-c", RECEIVER, point) as program:
        yield program.line()
        if point:
            program.wait()


def filled() -> Arena:
    arena = Arena(8 * MIB)
    np.frombuffer(memoryview(arena), np.uint8)[:] = 1
    return arena


def moved() -> Arena:
    arena = filled()
    with receiver() as address:
        pageferry.migrate(arena, address)
    assert arena.status is Status.MOVED
    return arena


def test_late_write_ends_the_program_with_a_message() -> None:
    done = subprocess.run([sys.executable, "-c", WRITER], capture_output=True, text=True, timeout=60)
    assert done.stdout == "moved 7\n"
    assert done.returncode == -signal.SIGSEGV
    assert "write to an arena that has moved" in done.stderr


def test_late_write_of_another_process_ends_that_process() -> None:
    arena = filled()
    go, start = os.pipe()
    child = os.fork()
    if not child:
        os.read(go, 1)
        memoryview(arena)[0] = 2
        os._exit(0)
    with receiver() as address:
        pageferry.migrate(arena, address)
    os.write(start, b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_new_buffers_are_read_only() -> None:
    arena = moved()
    view = np.frombuffer(memoryview(arena), np.uint8)
    assert view[5] == 1
    assert not view.flags.writeable
    with pytest.raises(TypeError, match="read-only"):
        memoryview(arena)[0] = 1


def test_every_use_of_a_moved_arena_is_refused(tmp_path: Path) -> None:
    arena = moved()
    calls = [
        lambda: pageferry.migrate(arena, "127.0.0.1:1"),
        lambda: pageferry.checkpoint(arena, tmp_path / "image"),
        lambda: arena.register("again"),
        arena.collapse,
        arena.fileno,
    ]
    for call in calls:
        with pytest.raises(WorkloadError, match="has been migrated"):
            call()


# -- resources of failed operations whose error is kept


def kept(arena: Arena) -> tuple[int, int, int]:
    """Return this process's numbers of mappings of the arena, of traced mappings, and of open descriptors."""
    status = os.fstat(arena.fileno())
    mapped = [(mapping.device, mapping.inode) for mapping in proc.file_mappings(os.getpid())]
    return mapped.count((status.st_dev, status.st_ino)), moving.traces(os.getpid()), len(os.listdir("/proc/self/fd"))


def assert_keeps_no_more(arena: Arena, before: tuple[int, int, int]) -> None:
    """Check that this process keeps what it had before, or less: descriptors of earlier tests may have been closed."""
    after = kept(arena)
    assert after[:2] == before[:2]
    assert after[2] <= before[2]


def test_failed_migration_keeps_no_resources_while_its_error_is_kept() -> None:
    arena = filled()
    gc.collect()
    before = kept(arena)
    with receiver("load") as address, pytest.raises(MigrationError) as failed:
        pageferry.migrate(arena, address)
    assert_keeps_no_more(arena, before)
    assert failed.value is not None
    with receiver() as address:
        assert pageferry.migrate(arena, address).status == "completed"


def test_arena_taken_back_keeps_no_resources_while_the_error_is_kept(tmp_path: Path) -> None:
    arena = filled()
    gc.collect()
    before = kept(arena)
    with receiver("resume") as address, pytest.raises(OutcomeUnknown) as doubt:
        pageferry.migrate(arena, address)
    with pytest.raises(WorkloadError, match=r"pageferry\.recover"):
        pageferry.migrate(arena, "127.0.0.1:1")
    pageferry.take_back(arena, doubt.value)
    assert_keeps_no_more(arena, before)
    assert pageferry.checkpoint(arena, tmp_path / "image").status == "completed"
    with receiver() as address:
        assert pageferry.migrate(arena, address).status == "completed"


def test_failed_checkpoint_keeps_no_resources_while_its_error_is_kept(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise ZeroDivisionError

    arena = Arena(8 * MIB, state=(fail, lambda _: None))
    gc.collect()
    before = kept(arena)
    for mode in ("lazy", "stop"):
        with pytest.raises(ZeroDivisionError) as failed:
            pageferry.checkpoint(arena, tmp_path / "image", mode=mode)
        assert_keeps_no_more(arena, before)
        assert failed.value is not None


def test_failed_receiver_keeps_no_connection_while_its_error_is_kept() -> None:
    arena = filled()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))

    def refuse(_: bytes) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        listening: asyncio.Queue[str] = asyncio.Queue()
        receiving = asyncio.create_task(
            pageferry.receive_async("127.0.0.1:0", state=(bytes, refuse), listening=listening.put_nowait)
        )
        address = await listening.get()
        results = await asyncio.gather(pageferry.migrate_async(arena, address), receiving, return_exceptions=True)
        assert isinstance(results[0], PageferryError)
        assert isinstance(results[1], ZeroDivisionError)
        errors.extend(results)

    errors: list[object] = []
    asyncio.run(main())
    gc.collect()  # frees the arena, which is part of a reference cycle
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # frames of the callback keep the received arena
