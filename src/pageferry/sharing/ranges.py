"""Advice about memory of other processes: madvise(2) calls executed inside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pageferry._engine import Advice
from pageferry.errors import UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host.smaps import smaps, spare_mappings
from pageferry.memory.regions import LARGE_PAGE
from pageferry.workloads.target import Target


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Part of a process's memory, in whole pages."""

    pid: int
    address: int
    length: int
    """Length, bytes."""

    @property
    def end(self) -> int:
        """First address after the range."""
        return self.address + self.length


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Merge adjacent ranges; the result is sorted by process and address."""
    found: list[Range] = []
    for one in sorted(ranges):
        if found and (found[-1].pid, found[-1].end) == (one.pid, one.address):
            found[-1] = Range(one.pid, found[-1].address, found[-1].length + one.length)
        else:
            found.append(one)
    return found


def advise(target: Target, one: Range, *advices: Advice) -> None:
    """Apply all advice, in order, to a range, inside its process.

    Raises WorkloadDied, UnsupportedError if no call can be executed in the process, WorkloadError if the call failed.
    """
    try:
        for advice in advices:
            target.space(one.pid).madvise(one.address, one.length, advice)
    except ProcessLookupError as gone:
        raise WorkloadDied(f"{target.name}: process {one.pid} has exited") from gone
    except PermissionError as refused:
        raise UnsupportedError(f"cannot advise the kernel about memory of {target.name}: {refused}") from refused
    except OSError as error:
        where = f"{one.length >> 10} KiB at {one.address:#x} of process {one.pid}"
        raise WorkloadError(f"cannot advise the kernel about memory of {target.name} ({where}): {error}") from error


def take_back(target: Target, one: Range) -> None:
    """Unmerge a range, and allow huge pages in it.

    Each call covers one 2 MiB unit, because the process itself executes the calls and is interrupted during each.
    """
    for start in range(one.address, one.end, LARGE_PAGE):
        advise(target, Range(one.pid, start, min(LARGE_PAGE, one.end - start)), Advice.UNMERGEABLE, Advice.HUGEPAGE)


def affordable(pid: int, ranges: Sequence[Range]) -> Sequence[Range]:
    """Return as many of the first ranges as leave the process half of its maximum number of mappings.

    A separate range costs two mappings: the kernel splits the mapping before and after it.
    """
    return ranges[: spare_mappings(pid) // 2]


def pss(ranges: Sequence[Range]) -> int:
    """Return the proportional memory (Pss of smaps, bytes) of these ranges in their processes. Each range must be a
    mapping."""
    total = 0
    for pid in {one.pid for one in ranges}:
        ours = [one for one in ranges if one.pid == pid]
        for smap in smaps(pid):
            at = smap.mapping
            if any(one.address < at.end and at.address < one.end for one in ours):
                total += smap.counts.get("Pss", 0)
    return total


def undo(target: Target) -> int:
    """Revert all advice in the target, and collapse the ranges that had advice to huge pages. Return the number of
    bytes processed.

    Such a range is excluded from huge pages and, unless it is in a file of a workload, mergeable. Ranges that are
    registered with a userfaultfd are skipped.
    """
    undone = 0
    for pid in target.pids:
        shared = [area for area in target.areas if area.pid == pid and area.kind == "shared"]
        for smap in smaps(pid):
            at = Range(pid, smap.mapping.address, smap.mapping.length)
            file = target.workload is not None and any(one.address <= at.address < one.end for one in shared)
            if "nh" not in smap.flags or not ("mg" in smap.flags or file):
                continue
            if {"um", "ui"} & set(smap.flags):
                continue  # registered with a userfaultfd: a huge page with missing pages must not be mapped
            if file:
                advise(target, at, Advice.HUGEPAGE)
            else:
                take_back(target, at)
            _enlarge(target, at)
            undone += at.length
    return undone


def _enlarge(target: Target, one: Range) -> None:
    first = -(-one.address // LARGE_PAGE) * LARGE_PAGE
    for address in range(first, one.end - LARGE_PAGE + 1, LARGE_PAGE):
        with contextlib.suppress(OSError):  # no huge page is free: base pages stay
            target.space(one.pid).collapse(address, LARGE_PAGE)
