"""Write traces (S2): every write is reported. Fine traces report written pages, coarse traces report whole units."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry._engine import LARGE_PAGE, SMALL_PAGE, Ledger, MappedSegment, Mapping, PageSet, Space, Trace
from tests.kernel.backing import KINDS, backing
from tests.kernel.programs import wait_until
from tests.kernel.target import Target

SLOTS = LARGE_PAGE // SMALL_PAGE
LENGTH = 4 * LARGE_PAGE
PAGES = LENGTH // SMALL_PAGE
_PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@pytest.fixture(params=KINDS)
def fd(request: pytest.FixtureRequest) -> Iterator[int]:
    with backing(request.param, LENGTH) as (fd,):
        yield fd


@pytest.fixture
def small() -> Iterator[int]:
    with backing("small", LENGTH) as (fd,):
        yield fd


@pytest.fixture
def large() -> Iterator[int]:
    with backing("large", LENGTH) as (fd,):
        yield fd


def mapped_large(mapping: Mapping) -> int:
    """Return the number of bytes that are mapped by PMDs (huge pages) in a mapping of this process."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    total, within = 0, False
    for line in lines:
        if "-" in line.split(" ", 1)[0]:
            start = int(line.split("-", 1)[0], 16)
            within = mapping.address <= start < mapping.address + mapping.length
        elif within and line.startswith("ShmemPmdMapped:"):
            total += int(line.split()[1]) << 10
    return total


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def own(mapping: Mapping, release_after: int = 0) -> Trace:
    large = mapping.large_units() if release_after and grain(mapping.fileno()) == 1 else []
    return Trace([MappedSegment(Space(), mapping.address, mapping.length)], release_after, [large])


def collect(trace: Trace, pages: int = PAGES) -> set[int]:
    dirty = PageSet(pages)
    trace.collect([dirty])
    return members(dirty)


def members(pages: PageSet) -> set[int]:
    return {page for start, end in pages.runs() for page in range(start, end)}


def write(mapping: Mapping, pages: set[int], byte: int = 1) -> None:
    for page in pages:
        ctypes.memset(mapping.address + page * SMALL_PAGE + 99, byte, 1)


def grain(fd: int) -> int:
    """Return the number of base pages per page of a file, which is the minimum granularity of a trace."""
    return os.fstatvfs(fd).f_bsize // SMALL_PAGE


def coarse(pages: set[int], unit: int) -> set[int]:
    return {
        page for first in {page // unit * unit for page in pages} for page in range(first, min(first + unit, PAGES))
    }


@pytest.mark.parametrize("filled", [False, True])
def test_fine_trace_reports_exactly_the_written_pages(fd: int, filled: bool) -> None:
    mapping, randomly = Mapping(fd, LENGTH), random.Random(17)
    if filled:
        write(mapping, set(range(PAGES)))
    trace = own(mapping)
    assert collect(trace) == set()
    for count in (1, 5, 100, 1500, 0, 3):
        written = {randomly.randrange(PAGES) for _ in range(count)}
        write(mapping, written)
        assert collect(trace) == coarse(written, grain(fd))
        assert collect(trace) == set()


def test_peek_does_not_collect(fd: int) -> None:
    mapping = Mapping(fd, LENGTH)
    trace = own(mapping)
    write(mapping, {3, 700})
    for _ in range(2):
        seen = PageSet(PAGES)
        trace.peek([seen])
        assert members(seen) == coarse({3, 700}, grain(fd))
    assert collect(trace) == coarse({3, 700}, grain(fd))


def test_reads_are_not_reported(fd: int) -> None:
    mapping = Mapping(fd, LENGTH)
    write(mapping, {5})
    trace = own(mapping)
    for page in range(0, PAGES, 7):
        ctypes.string_at(mapping.address + page * SMALL_PAGE, 1)
    assert collect(trace) == set()


def test_writes_of_another_process_are_reported(fd: int) -> None:
    with Target(fd) as target:
        address = target.order("map", fd, LENGTH)
        trace = Trace([MappedSegment(Space(target.pid), address, LENGTH)])
        written = {random.Random(3).randrange(PAGES) for _ in range(200)}
        target.order("write", address, sorted(written), 9)
        assert collect(trace) == coarse(written, grain(fd))
        target.order("write", address, [77], 9)
        assert collect(trace) == coarse({77}, grain(fd))


def test_writes_of_two_processes_to_shared_memory_are_reported(small: int) -> None:
    with Target(small) as one, Target(small) as other:
        spaces = [(Space(target.pid), target.order("map", small, LENGTH)) for target in (one, other)]
        trace = Trace([MappedSegment(space, address, LENGTH) for space, address in spaces])
        one.order("write", spaces[0][1], [1, 2, 900], 1)
        other.order("write", spaces[1][1], [2, 3], 2)
        assert collect(trace) == {1, 2, 3, 900}
        other.order("write", spaces[1][1], [900], 2)
        assert collect(trace) == {900}


def test_segments_report_pages_relative_to_the_region(small: int) -> None:
    mapping = Mapping(small, LENGTH)
    address, half = mapping.address, LENGTH // 2
    segments = [MappedSegment(Space(), address, half, 1), MappedSegment(Space(), address + half, half, 0, 100)]
    trace = Trace(segments)
    write(mapping, {4, PAGES // 2 + 4})
    first, second = PageSet(PAGES), PageSet(PAGES)
    trace.collect([first, second])
    assert (members(first), members(second)) == ({104}, {4})


@pytest.mark.parametrize("kind", ["small", "large"])
def test_page_unmapped_after_a_write_is_reported(kind: str) -> None:
    with backing(kind, LENGTH) as (fd,), Target(fd) as target:
        address = target.order("map", fd, LENGTH)
        trace = Trace([MappedSegment(Space(target.pid), address, LENGTH)])
        target.order("write", address, list(range(SLOTS)), 9)
        target.order("discard", address, LARGE_PAGE)
        assert collect(trace) == set(range(SLOTS))


def test_written_and_discarded_page_is_reported(small: int) -> None:
    mapping = Mapping(small, LENGTH)
    trace = own(mapping)
    write(mapping, {10, 11, 800})
    punch(small, 11, 1)
    assert collect(trace) == {10, 11, 800}
    # A discard is not a write. The sender detects discarded pages by comparison with the pages that it has sent.
    punch(small, 10, 1)
    assert collect(trace) <= {10}
    write(mapping, {10})
    assert collect(trace) == {10}


def punch(fd: int, page: int, pages: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    assert libc.fallocate(fd, _PUNCH, page * SMALL_PAGE, pages * SMALL_PAGE) == 0


@pytest.mark.parametrize("kind", ["small", "large"])
@pytest.mark.parametrize("release_after", [0, 1, 256])
def test_no_write_is_lost_while_collecting(kind: str, release_after: int) -> None:
    """Threads write continuously. A copy that consists of collected pages is identical to the memory at the end."""
    length = 16 * LARGE_PAGE
    with backing(kind, length) as (fd,):
        mapping = Mapping(fd, length)
        ledger = Ledger.create(mapping, threads=2, seed=5, zero_fraction=0.1, skew=2.0)
        ledger.start()
        trace = own(mapping, release_after)
        copy, memory = bytearray(length), memoryview(mapping).cast("B")
        dirty = PageSet.full(length // SMALL_PAGE)
        for number in range(40):
            if number == 39:
                ledger.pause()
            trace.collect([dirty])
            for start, end in dirty.runs():
                copy[start * SMALL_PAGE : end * SMALL_PAGE] = memory[start * SMALL_PAGE : end * SMALL_PAGE]
            dirty.clear()
        assert sum(ledger.writes()) > 1000
        assert (trace.released_units > 0) == (release_after > 0 and kind == "large")
        assert memory == copy
        ledger.stop()
        memory.release()


def test_coarse_traces_mark_whole_units(fd: int) -> None:
    mapping = Mapping(fd, LENGTH)
    write(mapping, set(range(PAGES)))
    trace = own(mapping, 1)
    write(mapping, {SLOTS + 3, 3 * SLOTS})
    assert collect(trace) == set(range(SLOTS, 2 * SLOTS)) | set(range(3 * SLOTS, 4 * SLOTS))
    assert collect(trace) == set()
    write(mapping, {SLOTS + 5})
    assert collect(trace) == set(range(SLOTS, 2 * SLOTS))


def test_coarse_traces_release_large_pages_as_such(large: int) -> None:
    mapping = Mapping(large, LENGTH)
    write(mapping, set(range(PAGES)))
    trace = own(mapping, 1)
    assert mapped_large(mapping) == 0, "protection must split every PMD mapping"
    write(mapping, {SLOTS + 3, 3 * SLOTS})
    wait_until(lambda: trace.released_units == 2, "the release of two units")
    assert mapped_large(mapping) == 2 * LARGE_PAGE
    minor = faults()
    write(mapping, set(range(SLOTS, 2 * SLOTS)))
    assert faults() - minor < SLOTS // 4, "expected a single trap"
    assert collect(trace) == set(range(SLOTS, 2 * SLOTS)) | set(range(3 * SLOTS, 4 * SLOTS))
    assert mapped_large(mapping) == 0, "released units must be protected again"
    write(mapping, {SLOTS + 5})
    assert collect(trace) == set(range(SLOTS, 2 * SLOTS))


def test_large_pages_are_released_after_enough_traps(large: int) -> None:
    mapping = Mapping(large, LENGTH)
    write(mapping, set(range(PAGES)))
    trace = own(mapping, 256)
    write(mapping, set(range(255)))
    write(mapping, set(range(SLOTS, SLOTS + 256)))
    wait_until(lambda: trace.released_units == 1, "the release of one unit")
    assert collect(trace) == set(range(255)) | set(range(SLOTS, 2 * SLOTS))


def test_removed_trace_leaves_released_memory_intact(large: int) -> None:
    mapping = Mapping(large, LENGTH)
    write(mapping, set(range(PAGES)))
    trace = own(mapping, 1)
    write(mapping, {7, SLOTS + 3})
    wait_until(lambda: trace.released_units == 2, "the release of two units")
    trace.remove()
    assert "uw" not in flags(os.getpid(), mapping.address)
    write(mapping, set(range(PAGES)), 2)
    again = own(mapping, 0)
    write(mapping, {9})
    assert collect(again) == {9}


def test_traced_process_survives_killed_tracer(small: int) -> None:
    with Target(small) as target:
        address = target.order("map", small, LENGTH)
        target.order("write", address, [1], 1)
        with Target() as tracer:
            tracer.order("trace", target.pid, address, LENGTH)
            assert "uw" in flags(target.pid, address)
            tracer.kill()
        wait_until(lambda: "uw" not in flags(target.pid, address), "the removal of the trace")
        target.order("write", address, [1, 2, 3], 2)
        trace = Trace([MappedSegment(Space(target.pid), address, LENGTH)])
        target.order("write", address, [2], 3)
        assert collect(trace) == {2}


def flags(pid: int, address: int) -> list[str]:
    """Return the VmFlags of the mapping at an address. `uw`: registered for write protection."""
    mappings = Path(f"/proc/{pid}/smaps").read_text().split(f"\n{address:x}-", 1)[1]
    return next(line for line in mappings.splitlines() if line.startswith("VmFlags:")).split()[1:]


def test_second_trace_is_refused(small: int) -> None:
    mapping = Mapping(small, LENGTH)
    trace = own(mapping)
    with pytest.raises(
        OSError, match=f"process {os.getpid()} at {mapping.address:#x}: the memory is registered with another"
    ) as busy:
        own(mapping)
    assert busy.value.errno == errno.EBUSY
    write(mapping, {8})
    assert collect(trace) == {8}, "the first trace must be intact"
    trace.remove()
    own(mapping).remove()


def test_exited_process_is_an_error_and_keeps_other_pages(small: int) -> None:
    """Pages that were collected from other processes stay in the set, because each write is reported only once."""
    mapping = Mapping(small, LENGTH)
    with Target(small) as target:
        address = target.order("map", small, LENGTH)
        segments = [MappedSegment(Space(), mapping.address, LENGTH), MappedSegment(Space(target.pid), address, LENGTH)]
        trace = Trace(segments)
        write(mapping, {6})
        target.order("write", address, [7], 1)
        target.kill()
        dirty = PageSet(PAGES)
        with pytest.raises(ProcessLookupError):
            trace.collect([dirty])
        assert 6 in dirty
        trace.remove()


def test_collect_into_too_few_sets_is_refused(small: int) -> None:
    mapping = Mapping(small, LENGTH)
    half = LENGTH // 2
    trace = Trace(
        [MappedSegment(Space(), mapping.address, half), MappedSegment(Space(), mapping.address + half, half, 1)]
    )
    write(mapping, {5})
    with pytest.raises(OSError, match="cannot collect region 1"):
        trace.collect([PageSet(PAGES)])
    first, second = PageSet(PAGES), PageSet(PAGES)
    trace.collect([first, second])
    assert members(first) == {5}


def test_removed_trace_refuses_calls(small: int) -> None:
    mapping = Mapping(small, LENGTH)
    trace = own(mapping)
    trace.remove()
    with pytest.raises(ValueError, match="removed"):
        trace.collect([PageSet(PAGES)])
    assert "uw" not in flags(os.getpid(), mapping.address)
    trace.remove()
