"""Arenas in one process: buffers backed by a shared file, with huge pages if available."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pageferry import _engine
from pageferry.errors import NameInUse, NoSuchWorkload, UsageError, WorkloadError
from pageferry.host.registry import ArenaEntry, Registry
from pageferry.workloads.arena.arena import Arena, memory_file
from pageferry.workloads.lifecycle import Status
from pageferry.workloads.protocols import Migratable

MIB = 1 << 20


def nothing() -> None:
    """Do nothing; used as a callback."""


def test_arena_is_a_writable_buffer() -> None:
    arena = Arena(3 * MIB)
    words = np.frombuffer(arena, dtype=np.uint32)  # type: ignore[call-overload] # numpy's stub lists buffers by name
    words[:] = np.arange(words.size, dtype=np.uint32)
    assert words.nbytes == len(arena) == arena.length == 3 * MIB
    assert memoryview(arena)[4:8] == (1).to_bytes(4, "little")
    assert os.pread(arena.fileno(), 8, 4 * 1000) == b"\xe8\x03\0\0\xe9\x03\0\0"
    assert arena.address % (2 * MIB) == 0


def test_view_outlives_name_and_arena() -> None:
    arena = Arena(MIB)
    view = memoryview(arena)
    arena.close()
    del arena
    view[0] = 7
    assert view[0] == 7


LOW_LIMIT = """
import resource, pageferry.errors
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    pageferry.Arena("1MiB", capacity="1TiB")
except pageferry.errors.WorkloadError as error:
    print(error)
"""


def test_error_names_the_limit_of_the_address_space() -> None:
    done = subprocess.run([sys.executable, "-c", LOW_LIMIT], capture_output=True, text=True, timeout=60)
    assert "use a smaller size or `capacity`, or raise the limit of the address space" in done.stdout, done.stderr


def test_sizes_are_rounded_up() -> None:
    assert len(Arena(1)) == 4096
    assert len(Arena(4097)) == 8192
    with pytest.raises(UsageError):
        Arena(0)
    with pytest.raises(UsageError):
        Arena(-4096)


def test_memory_is_allocated_on_first_touch() -> None:
    arena = Arena(1 << 40)
    assert arena.data_ranges() == []
    memoryview(arena)[1 << 39] = 1
    (start, end) = arena.data_ranges()[0]
    assert start <= 1 << 39 < end
    assert end - start <= 2 * MIB


@pytest.mark.usefixtures("root")
def test_root_gets_large_pages_on_first_touch() -> None:
    arena = Arena(8 * MIB)
    assert arena.large_pages_by == "tmpfs"
    memoryview(arena)[3 * MIB] = 1
    assert arena.large_units() == [False, True, False, False]


def test_memfd_arena_can_be_collapsed() -> None:
    arena = Arena(6 * MIB, large_pages=False)
    assert arena.large_pages_by == "none"
    memoryview(arena)[: 4 * MIB] = bytes(4 * MIB)
    assert arena.large_units() == [False] * 3
    assert arena.collapse() == 4 * MIB
    assert arena.large_units() == [True, True, False]


def test_arena_over_existing_file_keeps_its_contents() -> None:
    file, _ = memory_file(4 * MIB)
    os.pwrite(file, b"received", MIB)
    arena = Arena.from_file(file, 4 * MIB)
    os.close(file)
    assert bytes(memoryview(arena)[MIB : MIB + 8]) == b"received"
    workload = arena.workload()
    assert not asyncio.run(workload.running())
    asyncio.run(workload.load_state(b"state"))
    assert arena.received_state == b"state"
    asyncio.run(workload.resume())
    assert arena.status is Status.RUNNING


def test_file_that_is_too_short_is_refused() -> None:
    file, _ = memory_file(MIB)
    for size in (2 * MIB, 0, 100):
        with pytest.raises(UsageError):
            Arena.from_file(file, size)
    os.close(file)


def test_names_are_unique_and_released_on_close() -> None:
    with Arena(MIB, "unique", on_pause=nothing) as arena:
        entry = Registry().lookup("unique")
        assert isinstance(entry, ArenaEntry)
        assert entry.pid == os.getpid()
        assert Path(entry.control_socket).stat().st_mode & 0o777 == 0o600
        assert arena.name == "unique"
        with pytest.raises(NameInUse):
            Arena(MIB, "unique", on_pause=nothing)
        with pytest.raises(UsageError):
            arena.register("another")
    with pytest.raises(NoSuchWorkload):
        Registry().lookup("unique")
    arena.register("again")
    arena.close()


def test_named_arena_requires_on_pause() -> None:
    with pytest.raises(UsageError, match="on_pause"):
        Arena(MIB, "restless")


def test_callbacks_are_called_in_order() -> None:
    calls: list[object] = []
    arena = Arena(
        MIB,
        state=(lambda: b"saved", calls.append),
        on_pause=lambda: calls.append("pause"),
        on_resume=lambda: calls.append("resume"),
        on_moved=lambda: calls.append("moved"),
    )
    workload = arena.workload()
    assert isinstance(workload, Migratable)

    async def move() -> None:
        await workload.pause()
        assert not await workload.running()
        assert await workload.save_state() == b"saved"
        await workload.load_state(b"loaded")
        await workload.resume()
        await workload.pause()
        await workload.commit()
        with pytest.raises(WorkloadError):
            await arena.workload().discard()
        await workload.discard()

    asyncio.run(move())
    assert calls == ["pause", b"loaded", "resume", "pause", "moved"]
    assert arena.status is Status.MOVED


def test_received_arena_that_never_ran_is_not_reported_as_moved() -> None:
    calls: list[str] = []
    file, _ = memory_file(MIB)
    arenas = [Arena.from_file(file, MIB, on_moved=lambda: calls.append("moved")) for _ in range(2)]
    os.close(file)

    async def discard() -> None:
        await arenas[0].workload().discard()
        assert calls == []
        workload = arenas[1].workload()
        await workload.resume()
        await workload.pause()
        await workload.discard()

    asyncio.run(discard())
    assert calls == ["moved"]


def test_failing_on_pause_leaves_arena_running() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    calls: list[str] = []
    arena = Arena(MIB, on_pause=fail, on_resume=lambda: calls.append("resume"))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(arena.workload().pause())
    assert (arena.status, calls) == (Status.RUNNING, ["resume"])


def test_state_that_is_not_bytes_is_refused() -> None:
    arena = Arena(MIB, state=(lambda: "text", nothing))  # type: ignore[arg-type,return-value]
    workload = arena.workload()
    asyncio.run(workload.pause())
    with pytest.raises(WorkloadError, match="str instead of bytes"):
        asyncio.run(workload.save_state())


def test_region_describes_the_mapping() -> None:
    arena = Arena(4 * MIB)
    (region,) = arena.workload().regions
    (segment,) = region.segments
    assert (segment.pid, segment.address, segment.length) == (os.getpid(), arena.address, 4 * MIB)
    memoryview(arena)[5] = 9
    assert bytes(memoryview(_engine.Mapping(region.fd, region.length))[4:7]) == b"\0\x09\0"
