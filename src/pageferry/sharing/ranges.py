"""Advice about ranges of processes' memory, given from outside: madvise(2) calls made inside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pageferry.errors import UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host.smaps import smaps, spare_mappings
from pageferry.memory.regions import LARGE_PAGE
from pageferry.workloads.target import Target

MERGEABLE, UNMERGEABLE, HUGEPAGE, NOHUGEPAGE = 12, 13, 14, 15
_MADVISE = 28  # of x86-64, the one architecture on which calls are made in other processes


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """A part of a process's memory, in whole pages."""

    pid: int
    address: int
    length: int
    """Bytes."""

    @property
    def end(self) -> int:
        """First address after it."""
        return self.address + self.length


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same memory in as few ranges as it takes, by process and address."""
    found: list[Range] = []
    for one in sorted(ranges):
        if found and (found[-1].pid, found[-1].end) == (one.pid, one.address):
            found[-1] = Range(one.pid, found[-1].address, found[-1].length + one.length)
        else:
            found.append(one)
    return found


def advise(target: Target, one: Range, *advices: int) -> None:
    """Make a process give advice about a range of its own, one after the other.

    Raises WorkloadDied, UnsupportedError where no call can be made in it, WorkloadError when the call failed.
    """
    try:
        for advice in advices:
            target.space(one.pid).call(_MADVISE, one.address, one.length, advice)
    except ProcessLookupError as gone:
        raise WorkloadDied(f"{target.name}: process {one.pid} is gone") from gone
    except PermissionError as refused:
        raise UnsupportedError(f"{target.name}: {refused}") from refused
    except OSError as error:
        where = f"{one.length >> 10} KiB at {one.address:#x} of process {one.pid}"
        raise WorkloadError(f"{target.name}: advice about {where}: {error}") from error


def take_back(target: Target, one: Range) -> None:
    """Have what was merged in a range copied again, and large pages allowed there.

    A large page's worth at a time: the process has to do it, and is kept from its own work meanwhile.
    """
    for start in range(one.address, one.end, LARGE_PAGE):
        advise(target, Range(one.pid, start, min(LARGE_PAGE, one.end - start)), UNMERGEABLE, HUGEPAGE)


def affordable(pid: int, ranges: Sequence[Range]) -> Sequence[Range]:
    """As many of the ranges, from the first, as leave the process half of the mappings it may have.

    A range of its own costs two: the kernel cuts the mapping before and after it.
    """
    return ranges[: spare_mappings(pid) // 2]


def pss(ranges: Sequence[Range]) -> int:
    """Bytes that ranges, marked before, cost their processes; shared pages in proportion (Pss of smaps)."""
    total = 0
    for pid in {one.pid for one in ranges}:
        ours = [one for one in ranges if one.pid == pid]
        for smap in smaps(pid):
            at = smap.mapping
            if any(one.address < at.end and at.address < one.end for one in ours):
                total += smap.counts.get("Pss", 0)
    return total


def undo(target: Target) -> int:
    """Take all marks of the target back, and put it on large pages again; returns how many bytes that was for.

    Marks are mergeable ranges kept from large pages, and those of a workload's files that are.
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
                continue  # a pager has it: a large page that is not all there must not be mapped
            if file:
                advise(target, at, HUGEPAGE)
            else:
                take_back(target, at)
            _enlarge(target, at)
            undone += at.length
    return undone


def _enlarge(target: Target, one: Range) -> None:
    first = -(-one.address // LARGE_PAGE) * LARGE_PAGE
    for address in range(first, one.end - LARGE_PAGE + 1, LARGE_PAGE):
        with contextlib.suppress(OSError):  # there is no large page to be had: it stays small
            target.space(one.pid).collapse(address, LARGE_PAGE)
