"""Tests of sharing without the kernel: choice of huge pages, pace, order of KSM settings, and human-readable output."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pageferry.report.sharing import SharingView
from pageferry.sharing import ksm, policy, ranges
from pageferry.sharing.events import ApplyEvent, Class, Point, ScanEvent, ScanReport, SharingResult
from pageferry.sharing.ranges import Range
from pageferry.sharing.scan import Place, Unit

REGION = 2 << 20
RESULT = SharingResult(
    workloads=["a", "b"],
    memory=1 << 30,
    large_pages=512,
    already_shared=1 << 20,
    reclaimable=300 << 20,
    possible=100 << 20,
    classes={name: Class(25600, 100 << 20) for name in ("zero", "pattern", "inside")} | {"across": Class(0, 0)},
    curve=[Point(number, number << 20, number << 18) for number in range(64)],
    scan=ScanReport(1 << 30, 500.0, 1, 1),
    threshold=64,
    not_shareable=["pages of hugetlbfs cannot be split"],
)


def unit(number: int, *, large: bool = True, zero: int = 0, inside: int = 0, anonymous: bool = True) -> Unit:
    regions = (SimpleNamespace(page_size=4096),)
    area = object() if anonymous else None
    place = Place(0, cast("Any", SimpleNamespace(regions=regions)), cast("Any", area), None if area else 0, 0, REGION)
    return Unit(number, place, number * REGION, REGION, large, 512, 0, 0, zero, 0, inside, 0)


def test_threshold_falls_with_free_memory() -> None:
    found = [policy.threshold(percent / 100) for percent in range(101)]
    assert found == sorted(found)
    assert (found[0], found[10], found[50], found[100]) == (
        policy.MIN_THRESHOLD,
        policy.MIN_THRESHOLD,
        policy.MAX_THRESHOLD,
        policy.MAX_THRESHOLD,
    )
    assert policy.MIN_THRESHOLD < found[30] < policy.MAX_THRESHOLD


def test_pace_has_hysteresis() -> None:
    pace = policy.Pace()
    free = [0.5, 0.2, 0.1, 0.2, 0.24, 0.26, 0.2, 0.14]
    hurried = [pace.budget(part) == policy.Pace.HURRIED for part in free]
    assert hurried == [False, False, True, True, True, False, False, True]


def test_best_large_pages_are_chosen_except_hot_ones() -> None:
    units = [unit(0, inside=100), unit(1, inside=300), unit(2, zero=200), unit(3, inside=5), unit(4, inside=400)]

    def numbers(**options: Any) -> list[int]:
        return [one.number for one in policy.choose(units, 100, **options)]

    assert numbers() == [4, 1, 2, 0]
    assert numbers(most=2) == [4, 1]
    assert numbers(hot={(0, 4 * REGION)}) == [1, 2, 0]


def test_small_pages_are_chosen_without_splitting() -> None:
    units = [unit(0, large=False, inside=policy.MIN_SHAREABLE), unit(1, large=False, inside=1), unit(2, inside=200)]
    assert [one.number for one in policy.choose(units, 256)] == [0]


def test_only_zeros_of_files_count() -> None:
    one = unit(0, zero=10, inside=400, anonymous=False)
    assert (one.shareable, one.possible) == (410, 10)
    assert policy.choose([one], 100) == []


@given(st.sets(st.tuples(st.integers(1, 3), st.integers(0, 40))))
def test_adjacent_ranges_are_joined(pages: set[tuple[int, int]]) -> None:
    found = ranges.joined(Range(pid, page * 4096, 4096) for pid, page in pages)
    covered = {(one.pid, page) for one in found for page in range(one.address // 4096, one.end // 4096)}
    assert covered == pages
    assert sum(one.length for one in found) == 4096 * len(pages)
    assert not {(one.pid, one.end) for one in found} & {(one.pid, one.address) for one in found}


def test_ksm_is_stopped_before_its_settings_are_restored() -> None:
    before = {"advisor_mode": "scan-time", "pages_to_scan": "100", "run": "0", "sleep_millisecs": "20"}
    order = ksm.undo_order(before)
    assert dict(order) == before
    assert (order[0], order[-1]) == (("run", "0"), ("advisor_mode", "scan-time"))
    assert ksm.undo_order({"run": "0"}) == [("run", "0")]


def shown(result: msgspec.Struct) -> str:
    stream = StringIO()
    Console(width=200, no_color=True, file=stream).print(SharingView().result(result))
    return stream.getvalue()


def test_estimate_is_shown_as_text() -> None:
    text = shown(RESULT)
    assert "duplicates between workloads" in text
    assert ["total", "300", "MiB"] in [line.split() for line in text.splitlines()]
    assert "scanned 1 GiB in 500.0 ms (2 GiB/s)" in text
    assert "note: pages of hugetlbfs" in text
    assert "freed" not in text


def test_result_is_shown_as_text() -> None:
    done = msgspec.structs.replace(
        RESULT, freed=5 << 20, estimated=5 << 20, large_pages_chosen=7, large_pages_broken=7, ksm_scans=5, pauses=0
    )
    text = " ".join(shown(done).split())
    assert "freed 5 MiB (estimate 5 MiB), 7 huge pages split of 7 chosen" in text
    assert "5 KSM scans" in text
    assert "pauses" not in text
    view = SharingView()
    assert view.line(ScanEvent(done=1, total=2)) is None
    assert view.line(ApplyEvent("merging", "3 ranges")) == "merging: 3 ranges"
    assert "freed 5 MiB" in (view.line(done) or "")


@pytest.mark.parametrize("field", ["freed", "large-pages-broken"])
def test_json_omits_actions_that_were_not_done(field: str) -> None:
    assert field not in msgspec.to_builtins(RESULT)
    assert msgspec.to_builtins(RESULT)["type"] == "sharing"
