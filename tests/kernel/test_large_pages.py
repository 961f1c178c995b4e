"""Activity of huge pages (S3): known patterns are measured, no write is lost, and all PMD mappings are restored."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry._engine import LARGE_PAGE, SMALL_PAGE, Ledger, Mapping, Sampler, Space
from pageferry.density import HOT, hot_large_pages, shareable_pages
from pageferry.errors import UnsupportedError, UsageError, WorkloadDied, WorkloadError
from pageferry.host.smaps import smaps
from pageferry.large_pages.api import sample_async
from pageferry.large_pages.events import LargePagesResult
from pageferry.large_pages.options import Options
from pageferry.large_pages.policy import Threshold
from pageferry.large_pages.sampler import Tracker
from pageferry.large_pages.swap import check_swap
from pageferry.workloads.target import open_target_async, process_target
from tests.kernel.backing import backing
from tests.kernel.large import frames, large_mapped, only, while_doing
from tests.kernel.programs import Program, wait_until
from tests.kernel.swap import swap_space
from tests.kernel.target import Target

SLOTS = LARGE_PAGE // SMALL_PAGE
UNITS = 6
LENGTH = UNITS * LARGE_PAGE
PATTERNS: dict[int, set[int]] = {
    0: set(range(SLOTS)),  # dense
    1: set(range(0, SLOTS, 8)),  # sparse
    2: {77},  # one page, not the page that the sampler marks
    3: {0, 511},  # the first page, which the sampler marks, and the last page
    4: set(),  # cold
    5: set(range(100, 300)),
}


@dataclasses.dataclass
class Memory:
    """Memory of another process, entirely on huge pages."""

    owner: Target
    address: int
    kind: str

    def access(self) -> None:
        """Access the base pages in PATTERNS: read every other page, and write to the others."""
        pages = [unit * SLOTS + slot for unit, slots in PATTERNS.items() for slot in slots]
        self.owner.order("read", self.address, pages[::2])
        self.owner.order("write", self.address, pages[1::2], 1)

    def large(self) -> set[int]:
        return large_mapped(self.owner.pid, self.address, LENGTH)

    def flags(self) -> set[str]:
        return {
            flag
            for smap in smaps(self.owner.pid)
            if self.address <= smap.mapping.address < self.address + LENGTH
            for flag in smap.flags
        }


@pytest.fixture(params=["shared", "anon"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    with backing("large", LENGTH) as (fd,), Target(fd) as owner:
        if request.param == "shared":
            address = owner.order("map", fd, LENGTH)
            owner.order("write", address, list(range(LENGTH // SMALL_PAGE)), 1)
        else:
            address = owner.order("anonymous", LENGTH)
        found = Memory(owner, address, request.param)
        if len(found.large()) < UNITS:
            pytest.skip("not enough contiguous memory for huge pages")
        yield found


def test_known_access_patterns_are_measured(memory: Memory) -> None:
    async def look() -> dict[int, tuple[int, int | None]]:
        with only(memory.owner.pid, memory.address) as target, Tracker(target) as tracker:
            pages = [page for page in tracker.large_pages() if memory.address <= page.address < memory.address + LENGTH]
            assert len(pages) == UNITS
            found = {}
            for half in (pages[::2], pages[1::2]):  # no two adjacent pages
                for activity in await while_doing(memory.access, tracker.window(half, 0.02)):
                    unit = (activity.page.address - memory.address) // LARGE_PAGE
                    found[unit] = (activity.count, activity.touched)
            assert tracker.small == []
            return found

    found = asyncio.run(look())
    assert {unit: count for unit, (count, _) in found.items()} == {unit: len(slots) for unit, slots in PATTERNS.items()}
    if memory.kind == "shared":
        bits = {unit: sum(1 << slot for slot in slots) for unit, slots in PATTERNS.items()}
        assert {unit: touched for unit, (_, touched) in found.items()} == bits
    assert len(memory.large()) == UNITS
    assert "uw" not in memory.flags()


def test_sharing_spares_large_pages_in_use(memory: Memory) -> None:
    hot = asyncio.run(while_doing(memory.access, hot_large_pages([f"pid:{memory.owner.pid}"])))
    with process_target(memory.owner.pid) as target:
        (area,) = [area for area in target.areas if area.address <= memory.address < area.end]
    first = memory.address if memory.kind == "anon" else area.offset + memory.address - area.address
    ours = {(start - first) // LARGE_PAGE for _, start in hot if first <= start < first + LENGTH}
    assert ours == {unit for unit, slots in PATTERNS.items() if len(slots) >= HOT}


def test_reclaim_knows_shareable_pages(memory: Memory) -> None:
    async def look() -> dict[tuple[int, int], int]:
        with only(memory.owner.pid, memory.address) as target:
            return await shareable_pages(target)

    found = asyncio.run(look())
    counts = {found.get((memory.owner.pid, memory.address + unit * LARGE_PAGE)) for unit in range(UNITS)}
    # All pages have the same non-zero contents. Pages of private memory can be shared, pages of files only if zero.
    assert counts == ({SLOTS} if memory.kind == "anon" else {0})


def test_sampling_keeps_shared_frames(root: None) -> None:
    """In shared memory, the same page frames are mapped before, during and after the sampling."""
    with backing("large", LENGTH) as (fd,), Target(fd) as owner:
        address = owner.order("map", fd, LENGTH)
        owner.order("write", address, list(range(LENGTH // SMALL_PAGE)), 1)
        before = frames(owner.pid, address, SLOTS)
        assert before == list(range(before[0], before[0] + SLOTS))
        sampler = Sampler(Space(owner.pid))
        sampler.hold([address])
        sampler.split([address], marked=True)
        assert frames(owner.pid, address, SLOTS) == [0] * SLOTS
        owner.order("read", address, [3, 400])
        during = frames(owner.pid, address, SLOTS)
        assert {slot: frame for slot, frame in enumerate(during) if frame} == {3: before[3], 400: before[400]}
        assert sampler.restore() == []
        assert frames(owner.pid, address, SLOTS) == before
        assert address in large_mapped(owner.pid, address, LENGTH)


def test_sampling_keeps_private_frames_until_restored(root: None) -> None:
    with Target() as owner:
        address = owner.order("anonymous", LENGTH)
        before = frames(owner.pid, address, SLOTS)
        sampler = Sampler(Space(owner.pid))
        sampler.hold([address])
        sampler.split([address], marked=False)
        sampler.cool([address])
        assert address not in large_mapped(owner.pid, address, LENGTH)
        owner.order("write", address, [3, 400], 1)
        assert frames(owner.pid, address, SLOTS) == before
        assert sampler.restore() == []


def test_activity_includes_all_processes_that_map_a_page() -> None:
    with backing("large", LENGTH) as (fd,), Target(fd) as one, Target(fd) as other:
        places = [(owner, owner.order("map", fd, LENGTH)) for owner in (one, other)]
        for owner, address in places:
            owner.order("write", address, list(range(LENGTH // SMALL_PAGE)), 1)
        target, second = process_target(one.pid), process_target(other.pid)
        number = next(area.region for area in target.areas if area.address == places[0][1])
        target.areas = tuple(
            area if area.pid == one.pid else dataclasses.replace(area, region=number)
            for area in (*target.areas, *second.areas)
            if area.address in (places[0][1], places[1][1]) and area.kind == "shared"
        )
        target.__post_init__()
        with target, second:
            tracker = Tracker(target)
            pages = tracker.large_pages()
            assert len(pages) == UNITS

            def access() -> None:
                one.order("read", places[0][1], [1, 2])
                other.order("write", places[1][1], [2, 3], 1)

            found = asyncio.run(while_doing(access, tracker.window(pages, 0.02)))
            assert found[0].touched == 0b1110
            assert sum(activity.count for activity in found) == 3
        for owner, address in places:
            assert len(large_mapped(owner.pid, address, LENGTH)) == UNITS


def test_result_covers_all_memory_of_a_process(memory: Memory) -> None:
    async def look() -> None:
        with only(memory.owner.pid, memory.address) as target:
            options = Options(sample=1.0, budget=None, window=0.02, rounds=4)
            result = await while_doing(memory.access, sample_async(target, options))
        mine = {one.address: one for one in result.samples if memory.address <= one.address < memory.address + LENGTH}
        assert [mine[address].activity for address in sorted(mine)] == [len(slots) for slots in PATTERNS.values()]
        assert all((one.touched is None) <= (one.kind == "anon") for one in mine.values())
        assert sum(result.histogram) == len(result.samples) == result.estimate.sampled == result.estimate.large_pages
        assert result.estimate.low == result.estimate.mean == result.estimate.high
        assert result.not_restored == result.broken == result.reclaimed == 0

    asyncio.run(look())
    assert len(memory.large()) == UNITS


@pytest.mark.parametrize("window", [0.001, 0.02])
def test_no_write_is_lost_during_sampling(window: float) -> None:
    length = 16 * LARGE_PAGE
    with backing("large", length) as (fd,):
        mapping = Mapping(fd, length)
        ledger = Ledger.create(mapping, threads=2, seed=3, zero_fraction=0.1)
        ledger.start()

        async def look() -> int:
            with only(os.getpid(), mapping.address) as target:
                options = Options(sample=1.0, budget=None, window=window, rounds=1)
                results = [await sample_async(target, options) for _ in range(20)]
            assert all(result.not_restored == 0 for result in results)
            return sum(result.restored for result in results)

        restored = asyncio.run(look())
        wait_until(lambda: sum(ledger.writes()) > 1000, "a thousand writes")
        ledger.pause()
        assert ledger.verify().intact
        ledger.stop()
        assert restored == 20 * 16


def test_cancelled_window_restores_mappings(memory: Memory) -> None:
    async def look() -> None:
        with only(memory.owner.pid, memory.address) as target:
            tracker = Tracker(target)
            pages = [page for page in tracker.large_pages() if page.address >= memory.address][::2]
            task = asyncio.ensure_future(tracker.window(pages, 3600))
            await asyncio.sleep(0)
            assert "uw" in memory.flags()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(look())
    assert "uw" not in memory.flags()
    assert len(memory.large()) == UNITS


def test_sampled_process_survives_killed_sampler(memory: Memory) -> None:
    """The kernel removes the write protection. The memory is intact and mapped by PTEs, and can be collapsed."""
    shared = memory.kind == "shared"
    content = memory.owner.order("sum", memory.address, LENGTH)
    pages = [memory.address, memory.address + 2 * LARGE_PAGE]
    with Target() as killed:
        killed.order("split", memory.owner.pid, pages, shared)
        assert "uw" in memory.flags()
        killed.kill()
    wait_until(lambda: "uw" not in memory.flags(), "the removal of the registrations")
    memory.owner.order("write", memory.address, [0, 5, 2 * SLOTS], 2)
    assert memory.owner.order("sum", memory.address, LENGTH) == content + 3
    assert len(memory.large()) == UNITS - 2
    Space(memory.owner.pid).collapse(memory.address, LENGTH)
    assert len(memory.large()) == UNITS


def test_memory_held_by_another_command_is_refused(memory: Memory) -> None:
    other = Sampler(Space(memory.owner.pid))
    with only(memory.owner.pid, memory.address) as target, Tracker(target) as tracker:
        other.hold([memory.address + 2 * LARGE_PAGE])
        pages = [page for page in tracker.large_pages() if page.address >= memory.address][::2]
        with pytest.raises(WorkloadError, match=f"another command is using that of process {memory.owner.pid}"):
            asyncio.run(tracker.window(pages, 0.01))
    assert other.restore() == []
    assert len(memory.large()) == UNITS
    assert "uw" not in memory.flags()


def test_process_that_exits_during_the_window_is_an_error(memory: Memory) -> None:
    async def look() -> None:
        with only(memory.owner.pid, memory.address) as target:
            tracker = Tracker(target)
            pages = [page for page in tracker.large_pages() if page.address >= memory.address][::2]
            task = asyncio.ensure_future(tracker.window(pages, 0.02))
            await asyncio.sleep(0)
            memory.owner.kill()
            with pytest.raises(WorkloadDied):
                await task
            with pytest.raises(WorkloadDied):
                await Tracker(target).window(pages, 0.02)

    asyncio.run(look())


def test_memory_unmapped_during_the_window_is_left_out(memory: Memory) -> None:
    with only(memory.owner.pid, memory.address) as target, Tracker(target) as tracker:
        pages = [page for page in tracker.large_pages() if page.address >= memory.address][::2]
        memory.owner.order("call", "munmap", memory.address + 2 * LARGE_PAGE, LARGE_PAGE)
        found = asyncio.run(tracker.window(pages, 0.01))
    assert {activity.page.address for activity in found} == {page.address for page in pages} - {
        memory.address + 2 * LARGE_PAGE
    }
    assert len(memory.large()) == UNITS - 1


def test_locked_memory_is_sampled(memory: Memory, root: None) -> None:
    memory.owner.order("call", "mlock", memory.address, LENGTH)
    with only(memory.owner.pid, memory.address) as target, Tracker(target) as tracker:
        pages = [page for page in tracker.large_pages() if page.address >= memory.address][::2]
        found = asyncio.run(tracker.window(pages, 0.01))
    counts = {activity.page.address: activity.count for activity in found}
    expected = 0 if memory.kind == "shared" else SLOTS
    assert all(counts[memory.address + unit * LARGE_PAGE] == expected for unit in (0, 2, 4))
    assert len(memory.large()) == UNITS


def test_watch_runs_until_interrupted(memory: Memory) -> None:
    words = ("--watch", "--window", "20ms", "--output", "json", "--sample", "100%", "--budget", "0")
    with Program("-m", "pageferry", "large-pages", f"pid:{memory.owner.pid}", *words) as watching:
        while watching.json()["type"] != "large-pages":
            pass
        assert watching.json()["type"] == "large-pages"
        watching.process.send_signal(signal.SIGINT)
        assert watching.wait() == 128 + signal.SIGINT
    assert "uw" not in memory.flags()
    assert len(memory.large()) == UNITS


def test_targets_are_parsed() -> None:
    with pytest.raises(UsageError, match="expected a number after pid"):
        asyncio.run(open_target_async("pid:x"))
    with backing("large", LENGTH) as (fd,):
        mapping = Mapping(fd, LENGTH // 2, LENGTH // 2)
        with process_target(os.getpid()) as target:
            area = next(area for area in target.areas if area.address == mapping.address)
            assert (area.kind, area.length, area.page_size) == ("shared", LENGTH // 2, SMALL_PAGE)
            assert area.region is not None
            region = target.regions[area.region]
            assert region.file_offset + area.offset == LENGTH // 2
            assert os.fstat(region.fd).st_ino == os.fstat(fd).st_ino
            assert not any("stack" in area.name or "vdso" in area.name for area in target.areas)


def test_command_reports_json(memory: Memory) -> None:
    done = command(
        f"pid:{memory.owner.pid}", "--sample", "100%", "--window", "20ms", "--output", "json", "--budget", "0"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["type"] == "large-pages"
    samples = {one["address"]: one["activity"] for one in result["samples"]}
    assert {samples[memory.address + unit * LARGE_PAGE] for unit in range(UNITS)} == {0}, "expected no accesses"
    assert result["restored"] >= (UNITS if memory.kind == "shared" else 0)
    assert len(memory.large()) == UNITS
    assert "idle" in command(f"pid:{memory.owner.pid}", "--window", "20ms").stdout


def test_command_refuses_invalid_options() -> None:
    me = f"pid:{os.getpid()}"
    assert (command(me, "--reclaim", "store").returncode, command("pid:0x1").returncode) == (3, 2)
    assert command(me, "--sample", "0").returncode == 2
    assert command(me, "--threshold", "513").returncode == 2
    assert command("pid:4194305").returncode == 11


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pageferry", "large-pages", *words], capture_output=True, text=True, timeout=60
    )


def test_reclaim_to_swap_needs_swap() -> None:
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        pytest.skip("this host has swap")
    with pytest.raises(UnsupportedError, match="this host has no swap space"):
        check_swap()


def test_cold_pages_are_swapped_out_and_in(memory: Memory, swap: None) -> None:
    """Only huge pages up to the threshold are split. The others stay huge pages, and no contents change."""
    content = memory.owner.order("sum", memory.address, LENGTH)
    for slot in (0, 100, 511):
        memory.owner.order("write", memory.address, [unit * SLOTS + slot for unit in range(UNITS)], 1)

    async def look() -> LargePagesResult:
        with only(memory.owner.pid, memory.address) as target:
            options = Options(sample=1.0, budget=None, window=0.02, rounds=4, reclaim="swap")
            return await while_doing(memory.access, sample_async(target, options))

    result = asyncio.run(look())
    decisions = {(one.address - memory.address) // LARGE_PAGE: one.decision for one in result.samples}
    idle = {unit for unit, slots in PATTERNS.items() if len(slots) <= 64}
    assert {unit for unit, decision in decisions.items() if decision == "break"} >= idle
    assert memory.large() == {memory.address + unit * LARGE_PAGE for unit in PATTERNS.keys() - idle}
    cold = sum(SLOTS - len(PATTERNS[unit]) for unit in idle) * SMALL_PAGE
    assert result.reclaimed >= 0.95 * cold
    assert memory.owner.order("sum", memory.address, LENGTH) == content


def test_no_write_is_lost_during_reclaim(swap: None) -> None:
    length = 16 * LARGE_PAGE
    with backing("large", length) as (fd,):
        mapping = Mapping(fd, length)
        ledger = Ledger.create(mapping, threads=2, seed=8, zero_fraction=0.1, working_set=0.1)
        ledger.start()

        async def look() -> int:
            with only(os.getpid(), mapping.address) as target:
                options = Options(sample=1.0, budget=None, window=0.005, rounds=1, reclaim="swap")
                return sum(
                    [(await sample_async(target, options, policy=Threshold(activity=512))).reclaimed for _ in range(3)]
                )

        reclaimed = asyncio.run(look())
        written = sum(ledger.writes())
        wait_until(lambda: sum(ledger.writes()) > written + 1000, "a thousand more writes")
        ledger.pause()
        assert ledger.verify().intact
        ledger.stop()
        assert reclaimed > 0


@pytest.fixture
def swap(root: None) -> Iterator[None]:
    """Provide 64 MiB of swap space during a test."""
    with swap_space(64 << 20):
        yield
