"""Page sharing with the kernel's KSM: counts match those of a Python model, freed memory matches the estimate."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pageferry._engine import LARGE_PAGE, SMALL_PAGE, Advice, ClassCounts, Mapping, SharingScan, Space, free_zeros
from pageferry.errors import UnsupportedError, UsageError, WorkloadDied
from pageferry.host.smaps import total
from pageferry.sharing import api, ksm
from pageferry.sharing.events import SharingResult
from pageferry.sharing.options import Options
from pageferry.sharing.scan import CLASSES
from tests.kernel.backing import backing
from tests.kernel.lookalike import SLOTS, Lookalike, content, unique, worth
from tests.kernel.programs import Program, wait_until
from tests.kernel.swap import swap_space

LEDGER = {"threads": 2, "rate": 100 << 20, "zero_fraction": 0.5}


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Check that each test leaves the settings of KSM as they were before the test."""
    names = [name for name in ksm.SWITCHES if (ksm.FOLDER / name).exists()]
    before = {name: (ksm.FOLDER / name).read_text() for name in names}
    yield
    deadline = time.monotonic() + 10  # the guardian of a killed process restores the settings with a delay
    while (now := {name: (ksm.FOLDER / name).read_text() for name in names}) != before:
        assert time.monotonic() < deadline, f"KSM settings are {now}, were {before}"
        time.sleep(0.02)


@pytest.fixture
def ksm_usable(root: None) -> None:
    """Skip the test if KSM, which shares private memory, cannot be used."""
    try:
        ksm.check_unused(set(), merge_with_others=True)
    except UnsupportedError as reason:
        pytest.skip(str(reason))


def numbers_at_random(seed: int, pages: int) -> list[int]:
    """Return random numbers of page contents (see `lookalike`): zeros, patterns, frequent and unique contents."""
    choice = random.Random(seed)

    def number(page: int) -> int:
        kinds = (0, -choice.randrange(1, 5), choice.randrange(1, 200), unique(seed * pages + page))
        return choice.choice(kinds)

    return [number(page) for page in range(pages)]


def by_class(counts: ClassCounts) -> dict[str, int]:
    return {name: getattr(counts, name) for name in CLASSES}


def scanned(pieces: list[Any], most: int = 1 << 20) -> SharingScan:
    scan = SharingScan(pieces, most)
    while scan.step(3 << 20, 2):
        pass
    scan.finish()
    return scan


@pytest.mark.parametrize("kind", ["small", "large", "hugetlb"])
def test_scan_of_files_matches_plain_python(kind: str) -> None:
    """In the last of three workloads, every other unit of 2 MiB is a hole. The scan leaves holes as they are."""
    pages = 4 * SLOTS
    workloads = [numbers_at_random(seed, pages) for seed in (1, 2, 3)]
    with backing(kind, 4 * LARGE_PAGE, 3) as files:
        mappings = [Mapping(fd, 4 * LARGE_PAGE) for fd in files]
        for number, (mapping, numbers) in enumerate(zip(mappings, workloads, strict=True)):
            with memoryview(mapping).cast("B") as memory:
                for page, one in enumerate(numbers):
                    if number < 2 or page // SLOTS % 2:
                        memory[page * SMALL_PAGE : (page + 1) * SMALL_PAGE] = content(one)
        blocks = [os.fstat(fd).st_blocks for fd in files]
        scan = scanned([(number, mapping, 0, 4 * LARGE_PAGE) for number, mapping in enumerate(mappings)])
        assert [os.fstat(fd).st_blocks for fd in files] == blocks
    workloads[2] = workloads[2][SLOTS : 2 * SLOTS] + workloads[2][3 * SLOTS :]
    expected, freed = worth(workloads)
    assert [by_class(scan.totals.pages), by_class(scan.totals.freed)] == [expected, freed]
    units = scan.units()
    assert len(units) == 10
    assert {name: sum(by_class(unit.counts)[name] for unit in units) for name in CLASSES} == expected
    assert all(unit.large == (kind != "small") for unit in units)
    flat = [one for numbers in workloads for one in numbers]
    assert [unit.counts.zero for unit in units] == [flat[at : at + SLOTS].count(0) for at in range(0, len(flat), SLOTS)]


def test_holes_among_small_pages_stay_holes() -> None:
    with backing("small", 2 * LARGE_PAGE) as (fd,):
        mapping = Mapping(fd, 2 * LARGE_PAGE)
        with memoryview(mapping).cast("B") as memory:
            for page in (3, 400, SLOTS - 1, SLOTS + 7):
                memory[page * SMALL_PAGE : (page + 1) * SMALL_PAGE] = content(unique(1))
        scan = scanned([(0, mapping, 0, 2 * LARGE_PAGE)])
        assert os.fstat(fd).st_blocks * 512 == 4 * SMALL_PAGE
    assert [(unit.present, unit.counts.inside) for unit in scan.units()] == [(3, 3), (1, 1)]


@pytest.mark.usefixtures("root")
def test_swapped_pages_of_files_stay_in_swap() -> None:
    with swap_space(64 << 20), backing("small", LARGE_PAGE) as (fd,):
        mapping = Mapping(fd, LARGE_PAGE)
        with memoryview(mapping).cast("B") as memory:
            for page in range(SLOTS):
                memory[page * SMALL_PAGE : (page + 1) * SMALL_PAGE] = content(unique(1))
        space = Space()
        space.madvise(mapping.address, LARGE_PAGE, Advice.PAGEOUT)
        before = total(os.getpid(), "Swap")
        assert before >= LARGE_PAGE // 2
        scan = scanned([(0, mapping, 0, LARGE_PAGE)])
        (unit,) = scan.units()
        assert unit.present <= SLOTS - before // SMALL_PAGE
        assert total(os.getpid(), "Swap") == before


@pytest.mark.usefixtures("root")
def test_scan_of_private_memory_matches_plain_python() -> None:
    with Lookalike(4 * SLOTS) as target:
        numbers = numbers_at_random(7, 4 * SLOTS)
        target.order("fill", numbers)
        scan = scanned([(0, Space(target.pid), target.address, 4 * LARGE_PAGE)])
        expected, freed = worth([numbers])
        assert [by_class(scan.totals.pages), by_class(scan.totals.freed)] == [expected, freed]
        assert [(unit.position, unit.large) for unit in scan.units()] == [
            (target.address + number * LARGE_PAGE, True) for number in range(4)
        ]
        target.kill()
        again = SharingScan([], 1)
        assert (again.step(1, 1), again.units()) == (0, [])


def test_scan_with_little_memory_samples_contents() -> None:
    numbers = [1 + page % 1024 for page in range(8 * SLOTS)]
    with backing("small", 8 * LARGE_PAGE) as (fd,):
        mapping = Mapping(fd, 8 * LARGE_PAGE)
        with memoryview(mapping).cast("B") as memory:
            for page, one in enumerate(numbers):
                memory[page * SMALL_PAGE : (page + 1) * SMALL_PAGE] = content(one)
        scan = scanned([(0, mapping, 0, 8 * LARGE_PAGE)], most=len(numbers) // 3)
    assert scan.scale == 4
    freed = scan.totals.freed.inside
    assert 0.7 < freed / worth([numbers])[1]["inside"] < 1.3
    assert freed % (3 * 4) == 0, "sampling must include all copies of a page or none"


def test_curve_gives_pages_freed_by_the_first_units() -> None:
    numbers = numbers_at_random(11, 6 * SLOTS)
    with backing("small", 6 * LARGE_PAGE) as (fd,):
        mapping = Mapping(fd, 6 * LARGE_PAGE)
        with memoryview(mapping).cast("B") as memory:
            for page, one in enumerate(numbers):
                memory[page * SMALL_PAGE : (page + 1) * SMALL_PAGE] = content(one)
        scan = scanned([(0, mapping, 0, 6 * LARGE_PAGE)])
        order = [4, 1, 5, 0, 3, 2]
        curve, zeros = scan.curve(order, 1 << 31), scan.curve(order, 256, possible=True)
        with pytest.raises(OSError, match="no such unit"):
            scan.curve([6])
    taken: list[int] = []
    for unit, freed, free_zero in zip(order, curve, zeros, strict=True):
        taken += numbers[unit * SLOTS : (unit + 1) * SLOTS]
        assert freed == sum(worth([taken])[1].values())
        assert free_zero == taken.count(0)


@pytest.mark.usefixtures("root")
def test_zeros_become_holes_and_other_pages_stay() -> None:
    numbers = numbers_at_random(5, 3 * SLOTS)
    with backing("large", 3 * LARGE_PAGE) as (fd,):
        mapping = Mapping(fd, 3 * LARGE_PAGE)
        memory = memoryview(mapping).cast("B")
        for page, one in enumerate(numbers):
            memory[page * SMALL_PAGE : (page + 1) * SMALL_PAGE] = content(one)
        ranges = [(0, LARGE_PAGE), (2 * LARGE_PAGE, LARGE_PAGE)]
        freed = free_zeros(mapping, ranges, 10.0)
        zeros = [one == 0 and page // SLOTS != 1 for page, one in enumerate(numbers)]
        assert (freed.ranges, freed.pages) == (2, sum(zeros))
        assert os.fstat(fd).st_blocks * 512 == (len(numbers) - sum(zeros)) * SMALL_PAGE
        assert mapping.large_units() == [False, True, False]
        again = free_zeros(mapping, ranges, 10.0)
        assert (again.ranges, again.pages) == (2, 0)
        for page, one in enumerate(numbers):
            assert memory[page * SMALL_PAGE : (page + 1) * SMALL_PAGE] == content(one)
        memory.release()
        assert free_zeros(mapping, ranges, 0.0).ranges == 1
        with pytest.raises(OSError, match="beyond"):
            free_zeros(mapping, [(2 * LARGE_PAGE, 2 * LARGE_PAGE)], 1.0)


def rich_and_poor(units: int) -> list[int]:
    """Return numbers of page contents: huge pages with odd indices have 400 shareable pages, the others have one."""
    rich = [1 + page % 100 for page in range(300)] + [0] * 100
    poor = [1]
    blocks = [rich if unit % 2 else poor for unit in range(units)]
    return [
        block[page] if page < len(block) else unique(unit * SLOTS + page)
        for unit, block in enumerate(blocks)
        for page in range(SLOTS)
    ]


def share(*names: str, **options: Any) -> SharingResult:
    return api.share(names, merge_with_others=True, **options)


@pytest.mark.usefixtures("ksm_usable")
def test_only_chosen_large_pages_are_split() -> None:
    """Freed memory matches the estimate. Split huge pages stay split until `undo` restores them. No contents change."""
    units = 16
    with Lookalike(units * SLOTS) as target:
        target.order("fill", rich_and_poor(units))
        space, all_units = Space(target.pid), [target.address + number * LARGE_PAGE for number in range(units)]

        def large() -> list[int]:
            runs = space.large_mapped(target.address, units * LARGE_PAGE)
            return [at for start, end in runs for at in range(start, end, LARGE_PAGE)]

        assert large() == all_units
        result = share(f"pid:{target.pid}", threshold=100)
        assert large() == all_units[::2]
        assert (result.large_pages_chosen, result.large_pages_broken) == (units // 2, units // 2)
        assert result.freed is not None
        assert result.estimated is not None
        expected = (units // 2 * 400 - 100) * SMALL_PAGE
        assert abs(result.estimated - expected) < 0.02 * expected, "the interpreter's own memory may add up to 2 %"
        assert abs(result.freed - result.estimated) < 0.02 * result.estimated
        for address in all_units[1::2]:
            with pytest.raises(OSError, match="Invalid argument"):
                space.collapse(address, LARGE_PAGE)  # khugepaged is refused in the same way
        assert target.order("check") == []
        assert api.find([f"pid:{target.pid}"]).already_shared >= units // 2 * 300 * SMALL_PAGE
        assert api.undo([f"pid:{target.pid}"]) >= units // 2 * LARGE_PAGE
        assert large() == all_units
        assert target.order("check") == []


@pytest.mark.usefixtures("ksm_usable")
def test_processes_named_together_share_pages() -> None:
    with Lookalike(4 * SLOTS) as one, Lookalike(4 * SLOTS) as other:
        numbers = [unique(page) for page in range(4 * SLOTS)]
        for target in (one, other):
            target.order("fill", numbers)
        names = [f"pid:{one.pid}", f"pid:{other.pid}"]
        alone = api.find(names[:1])
        assert alone.reclaimable < 0.2 * len(numbers) * SMALL_PAGE
        result = share(*names, threshold=400)
        assert result.classes["across"].reclaimable >= len(numbers) * SMALL_PAGE
        assert (result.large_pages_chosen, result.large_pages_broken) == (8, 8)
        assert result.freed is not None
        assert 0.98 < result.freed / (len(numbers) * SMALL_PAGE) < 1.2
        assert (one.order("check"), other.order("check")) == ([], [])


@pytest.mark.usefixtures("ksm_usable")
def test_no_write_is_lost_while_private_memory_is_shared() -> None:
    with Lookalike(8 * SLOTS) as target:
        target.order("fill", rich_and_poor(8))
        target.order("hammer", list(range(-3, 30)), 1)
        for _ in range(2):
            share(f"pid:{target.pid}", threshold=50)
            api.undo([f"pid:{target.pid}"])
        assert target.order("rest") > 1000
        assert target.order("check") == []


@pytest.mark.usefixtures("ksm_usable")
@pytest.mark.parametrize("moment", [0.0, 0.05, 0.2])
def test_killed_sharer_leaves_memory_and_ksm_intact(moment: float) -> None:
    """The fixture `switches` waits until the settings of KSM are restored."""
    with Lookalike(8 * SLOTS) as target:
        target.order("fill", rich_and_poor(8))
        target.order("hammer", list(range(-3, 30)), 2)
        words = [
            "sharing",
            f"pid:{target.pid}",
            "--apply",
            "--threshold",
            "50",
            "--merge-with-others",
            "--output",
            "json",
        ]
        with Program("-m", "pageferry", *words) as sharer:
            while sharer.json()["type"] != "apply":
                pass
            time.sleep(moment)
            sharer.kill()
        assert target.order("rest") > 0
        assert target.order("check") == []
        api.undo([f"pid:{target.pid}"])
        assert target.order("check") == []


@pytest.mark.usefixtures("ksm_usable")
def test_ksm_in_use_by_others_is_refused() -> None:
    with Lookalike(SLOTS) as target, Lookalike(SLOTS) as other:
        run = ksm.FOLDER / "run"
        try:
            run.write_text("1")
            with pytest.raises(UnsupportedError, match="it is already enabled"):
                share(f"pid:{target.pid}")
            assert run.read_text() == "1\n"
        finally:
            run.write_text("0")
        Space(other.pid).madvise(other.address, LARGE_PAGE, Advice.MERGEABLE)
        with pytest.raises(UnsupportedError, match=rf"have mergeable memory: .*{other.pid} \(python"):
            ksm.check_unused({target.pid} | (set(ksm._users()) - {other.pid}))


@pytest.mark.usefixtures("root")
def test_cancelled_sharing_is_undone(monkeypatch: pytest.MonkeyPatch, ksm_usable: None) -> None:
    async def cancelled() -> ksm.Run:
        raise asyncio.CancelledError

    with Lookalike(4 * SLOTS) as target:
        target.order("fill", rich_and_poor(4))
        monkeypatch.setattr(ksm, "run_once", cancelled)
        with pytest.raises(asyncio.CancelledError):
            share(f"pid:{target.pid}", threshold=50)
        smaps = Path(f"/proc/{target.pid}/smaps").read_text()
        assert " mg" not in smaps
        assert " nh" not in smaps


@pytest.fixture
def ledger() -> Iterator[Program]:
    setup = {"name": "twins", "size": 64 << 20, "options": LEDGER}
    with Program("-m", "pageferry.demo.process", json.dumps(setup)) as program:
        assert program.json()["type"] == "ready"
        yield program
        program.process.send_signal(signal.SIGTERM)
        assert program.json()["intact"], "a write was lost"
        assert program.wait() == 0


@pytest.mark.usefixtures("root", "ledger")
def test_no_write_is_lost_while_zeros_of_an_arena_are_discarded() -> None:
    for _ in range(5):
        result = api.share(["twins"], threshold=50)
        assert result.freed
        assert result.pauses
        # The ledger keeps writing pages, so the number of zeros in the scan bounds the freed memory only roughly.
        assert 0 < result.freed < 1.5 * result.classes["zero"].reclaimable
        api.undo(["twins"])


@pytest.mark.usefixtures("root", "ledger")
@pytest.mark.parametrize("moment", [0.0, 0.01, 0.05])
def test_killed_sharer_leaves_arena_running(moment: float) -> None:
    wait_until(lambda: killed_at_work(moment), "pages to share")
    api.share(["twins"], threshold=50)  # succeeds only if the arena replies and can be paused


def killed_at_work(moment: float) -> bool:
    """Start `pageferry sharing --apply`, and kill the command `moment` seconds after it begins to share pages.

    Return False if the command has found no pages to share: the ledger produces zero pages only over time.
    """
    words = ["sharing", "twins", "--apply", "--threshold", "1", "--break-hot", "--output", "json"]
    with Program("-m", "pageferry", *words) as sharer:
        while (said := sharer.json()["type"]) not in ("apply", "sharing"):
            pass
        time.sleep(moment)
        sharer.kill()
    return bool(said == "apply")


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="once"):
        api.find([])
    with pytest.raises(UsageError, match="once"):
        api.find(["pid:1", "pid:1"])
    with pytest.raises(UsageError, match="512"):
        api.find([f"pid:{os.getpid()}"], threshold=513)
    with pytest.raises(UsageError, match="memory"):
        Options(memory=5)
    with pytest.raises(TypeError, match="expected a Mapping or a Space"):
        SharingScan([(0, 5, 0, LARGE_PAGE)], 10)  # type: ignore[list-item]


@pytest.mark.usefixtures("root")
def test_process_that_exits_during_the_scan_is_an_error() -> None:
    with Lookalike(4 * SLOTS) as target:
        target.order("fill", [unique(page) for page in range(4 * SLOTS)])

        async def scenario() -> None:
            await api.find_async([f"pid:{target.pid}"], listener=lambda _: target.kill())

        with pytest.raises(WorkloadDied):
            asyncio.run(scenario())


@pytest.mark.usefixtures("root")
def test_command_reports_json() -> None:
    with Lookalike(2 * SLOTS) as target:
        target.order("fill", rich_and_poor(2))
        command = [sys.executable, "-m", "pageferry", "sharing", f"pid:{target.pid}", "--output", "json"]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["type"] == "sharing"
        assert list(found["classes"]) == list(CLASSES)
        assert found["curve"][-1]["reclaimable"] == found["reclaimable"]
        assert found["curve"][0]["large-pages"] == 0
        assert "freed" not in found
