"""Sharing of pages in chosen huge pages: KSM merges private memory, and zeros are punched out of the files of
workloads.

Shared ranges are excluded from huge pages (MADV_NOHUGEPAGE). Otherwise, khugepaged would collapse them, which undoes
the sharing. MADV_COLLAPSE would do so silently. All other huge pages remain unchanged.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pageferry._engine import Advice, SharingScan, free_zeros
from pageferry.errors import UnsupportedError, WorkloadError
from pageferry.events import Listener
from pageferry.host.blocking import in_thread
from pageferry.memory.regions import LARGE_PAGE
from pageferry.sharing import ksm, ranges
from pageferry.sharing.events import ApplyEvent
from pageferry.sharing.ranges import Range
from pageferry.sharing.scan import Findings, Place, Unit
from pageferry.workloads.direct_io import registered_buffers
from pageferry.workloads.protocols import Migratable
from pageferry.workloads.target import Area, Target

PAUSE = 0.01
"""Target duration of a pause in which zeros of files are punched out, seconds."""


@dataclass(slots=True)
class Applied:
    """Results of sharing."""

    freed: int = 0
    """Memory freed, bytes."""
    broken: int = 0
    """Number of huge pages split."""
    ksm_scans: int = 0
    ksm_cpu: float = 0.0
    """CPU time of ksmd, seconds."""
    longest_pause: float = 0.0
    """Longest pause of a workload, seconds."""
    pauses: int = 0


def check_possible(targets: Sequence[Target], merge_with_others: bool) -> None:
    """Raise UnsupportedError, before anything is changed, if sharing requires KSM and KSM cannot be used."""
    if any(area.kind == "anon" for target in targets for area in target.areas):
        ksm.check_unused({pid for target in targets for pid in target.pids}, merge_with_others=merge_with_others)


async def apply(
    findings: Findings, chosen: Sequence[Unit], listener: Listener, *, merge_with_others: bool = False
) -> Applied:
    """Share pages in the chosen units. `merge_with_others`: see `ksm.check_unused`.

    If merging fails or is cancelled, all advice is reverted and merged pages are copied; punched-out zeros need not be
    restored. The settings of KSM are restored in any case.
    """
    applied = Applied()
    anonymous = [unit for unit in chosen if unit.place.anonymous]
    if anonymous:
        check_possible(findings.targets, merge_with_others)
        await _merge(findings, anonymous, applied, listener)
    by_place: defaultdict[int, list[Unit]] = defaultdict(list)
    for unit in chosen:
        if not unit.place.anonymous and unit.place.target.workload is not None:
            by_place[id(unit.place)].append(unit)
    for units in by_place.values():
        await _punch(units[0].place, units, applied, listener)
    applied.broken = await in_thread(_count_broken, findings)
    return applied


async def _merge(findings: Findings, units: Sequence[Unit], applied: Applied, listener: Listener) -> None:
    wanted: defaultdict[tuple[int, int], list[Range]] = defaultdict(list)
    for unit in units:
        assert unit.place.area is not None
        pid = unit.place.area.pid
        wanted[unit.place.workload, pid].append(Range(pid, unit.start, unit.length))
    marked: list[tuple[Target, Range]] = []
    try:
        for (workload, pid), found in wanted.items():
            for one in ranges.affordable(pid, ranges.joined(found)):
                marked.append((findings.targets[workload], one))
                await in_thread(ranges.advise, *marked[-1], Advice.NOHUGEPAGE, Advice.MERGEABLE)
        merging = [one for _, one in marked]
        listener(ApplyEvent("merging", f"{len(merging)} ranges, {sum(one.length for one in merging) >> 20} MiB"))
        before = ranges.pss(merging)
        run = await ksm.run_once()
    except BaseException:
        for target, one in reversed(marked):
            with contextlib.suppress(WorkloadError, UnsupportedError):
                ranges.take_back(target, one)
        raise
    applied.freed += before - ranges.pss(merging)
    applied.ksm_scans, applied.ksm_cpu = run.scans, run.cpu


async def _punch(place: Place, units: Sequence[Unit], applied: Applied, listener: Listener) -> None:
    """Punch out pages of zeros, in short pauses of the workload, so that the workload does not write while pages are
    compared."""
    target, workload, mapping = place.target, place.target.workload, place.mapping
    assert workload is not None
    assert mapping is not None
    for area in target.areas:
        if area.kind == "shared" and area.region == place.region:
            shown = [_within(area, unit) for unit in units]
            for one in ranges.affordable(area.pid, ranges.joined(one for one in shown if one.length > 0)):
                await in_thread(ranges.advise, target, one, Advice.NOHUGEPAGE)
    left = [(unit.start, unit.length) for unit in units]
    waiting = None
    if place.deferred is not None:  # the workload has a cold store
        assert place.region is not None
        waiting = place.deferred.flags, place.deferred.first_pages[place.region]
    listener(ApplyEvent("punching out zeros", f"{len(left)} units of 2 MiB, in pauses of about {PAUSE * 1e3:.0f} ms"))
    before = os.fstat(mapping.fileno()).st_blocks
    while left:
        await workload.prepare_pause()
        begin = time.monotonic()
        try:
            await workload.pause()
            # Run this in the event loop's thread: no other task may resume the workload before it has ended.
            left = _unpinned(workload, place, left)
            done = free_zeros(mapping, left, PAUSE, waiting).ranges
        finally:
            await workload.resume()
        applied.longest_pause = max(applied.longest_pause, time.monotonic() - begin)
        applied.pauses += 1
        left = left[done:]
    applied.freed += (before - os.fstat(mapping.fileno()).st_blocks) * 512


def _unpinned(workload: Migratable, place: Place, left: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the units without a buffer registered with io_uring: a device would continue to write to the old pages
    after these were punched out."""
    assert place.region is not None
    counts = registered_buffers(workload.regions)[place.region].unit_counts()
    return [(start, length) for start, length in left if not counts[start // LARGE_PAGE]]


def _within(area: Area, unit: Unit) -> Range:
    """Return the range in which a mapping shows a unit of its region. The length is not positive if the mapping does
    not show the unit."""
    start = max(unit.start, area.offset)
    end = min(unit.start + unit.length, area.offset + area.length)
    return Range(area.pid, area.address + start - area.offset, end - start)


def _count_broken(findings: Findings) -> int:
    """Return the number of units that were backed by huge pages before the scan and no longer are."""
    now = SharingScan([place.engine_piece() for place in findings.places], 1 << 20)
    large = {(unit.piece, unit.position) for unit in now.units() if unit.large}
    numbers = {id(place): number for number, place in enumerate(findings.places)}
    return sum(unit.large and (numbers[id(unit.place)], unit.start) not in large for unit in findings.units)
