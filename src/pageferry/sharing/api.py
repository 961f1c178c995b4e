"""Python API of page sharing (`pageferry.sharing`), which the command uses too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Unpack

import msgspec

from pageferry import values
from pageferry.errors import UsageError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import in_thread, synchronous
from pageferry.host.proc import available
from pageferry.host.registry import Registry
from pageferry.pager import records
from pageferry.pager.records import Deferred
from pageferry.sharing import apply, estimate, policy, ranges
from pageferry.sharing.events import SharingResult
from pageferry.sharing.options import Options, Selection, SelectionArguments
from pageferry.sharing.scan import Findings, look
from pageferry.workloads.deferred_access import wait_complete
from pageferry.workloads.folders import folder_of
from pageferry.workloads.target import Target, open_target_async


async def find_async(
    names: Sequence[str], options: Options | None = None, *, threshold: int | None = None, listener: Listener = ignore
) -> SharingResult:
    """Estimate how much memory sharing could free, within these targets (`NAME` or `pid:N`) and between them.

    `threshold`: minimum number of shareable base pages for which a huge page would be split; None to derive it from the
    available memory. Raises UsageError, and the same errors as `open_target` and `scan.look`.

    Examples:
        >>> import subprocess, pageferry
        >>> program = subprocess.Popen(["sleep", "60"])
        >>> found = pageferry.sharing.find([f"pid:{program.pid}"])
        >>> len(found.workloads)
        1
        >>> program.kill()
        >>> program.wait()
        -9
    """
    _check(options, listener)
    values.optional(values.count, "threshold", threshold, 1, 512)
    async with _opened(names) as targets:
        findings = await look(targets, options or Options(), listener)
        return estimate.result(findings, _threshold(threshold))


find = synchronous(find_async)


async def share_async(
    names: Sequence[str],
    options: Options | None = None,
    *,
    hot: Collection[tuple[int, int]] = frozenset(),
    listener: Listener = ignore,
    **selection: Unpack[SelectionArguments],
) -> SharingResult:
    """Scan the targets, then share duplicate pages in the huge pages that the policy selects.

    Pages are shared only between targets that the caller has named: a process that shares pages can infer from the
    duration of its writes whether another process has the same contents. `selection` are the fields of
    `pageferry.sharing.options.Selection`: threshold, max_large_pages, merge_with_others. `hot`: huge pages in use (S3),
    which are not split, as (index of the target, address or byte offset in its region). A restore in progress is
    completed first (S8). Raises the same errors as `find_async`, and UnsupportedError if KSM is required and cannot be
    used.

    Examples:
        >>> import subprocess, pageferry
        >>> program = subprocess.Popen(["sleep", "60"])
        >>> try:
        ...     result = pageferry.sharing.share([f"pid:{program.pid}"], threshold=256)
        ...     print(result.large_pages_broken)  # sleep uses no huge pages
        ... except pageferry.errors.UnsupportedError:  # for example, another program uses KSM
        ...     print(0)
        0
        >>> program.kill()
        >>> program.wait()
        -9
    """
    chosen = values.options(Selection, selection)
    _check(options, listener)
    async with _opened(names, "sharing") as targets:
        apply.check_possible(targets, chosen.merge_with_others)
        for target in targets:
            await _complete(target)
        findings = await look(targets, options or Options(), listener)
        return await _share(findings, chosen, hot, listener)


share = synchronous(share_async)


async def _share(
    findings: Findings, selection: Selection, hot: Collection[tuple[int, int]], listener: Listener
) -> SharingResult:
    """Share pages in the huge pages that the policy selects, and add the results to the estimate."""
    least = _threshold(selection.threshold)
    found = estimate.result(findings, least)
    chosen = policy.choose(findings.units, least, hot, selection.max_large_pages)
    expected = estimate.freed_by(findings, chosen)
    done = await apply.apply(findings, chosen, listener, merge_with_others=selection.merge_with_others)
    return msgspec.structs.replace(
        found,
        freed=done.freed,
        estimated=expected[-1] if expected else 0,
        large_pages_chosen=sum(unit.large for unit in chosen),
        large_pages_broken=done.broken,
        ksm_scans=done.ksm_scans,
        ksm_cpu_ms=done.ksm_cpu * 1e3,
        longest_pause_ms=done.longest_pause * 1e3,
        pauses=done.pauses,
    )


async def undo_async(names: Sequence[str]) -> int:
    """Undo sharing: unmerge pages, allow huge pages, and collapse the ranges. Return the number of bytes processed.

    Examples:
        >>> import subprocess, pageferry
        >>> program = subprocess.Popen(["sleep", "60"])
        >>> freed = pageferry.sharing.undo([f"pid:{program.pid}"])
        >>> program.kill()
        >>> program.wait()
        -9
    """
    async with _opened(names, "the undoing of sharing") as targets:
        return sum([await in_thread(ranges.undo, target) for target in targets])


undo = synchronous(undo_async)


async def _complete(target: Target) -> None:
    """Complete a restore in progress. Memory in a cold store is not loaded."""
    if target.workload is not None:
        folder = folder_of(target.workload)
        record = folder.load(records.RECORD, Deferred) if folder is not None else None
        if record is None or record.cold is None:
            await wait_complete(target.workload, traces=False)


def _check(options: Options | None, listener: Listener) -> None:
    values.optional(values.instance, "options", options, Options)
    values.function("listener", listener)


def _threshold(asked: int | None) -> int:
    if asked is None:
        return policy.threshold(available())
    return asked


@asynccontextmanager
async def _opened(names: Sequence[str], work: str | None = None) -> AsyncIterator[list[Target]]:
    """Open the targets. `work`: purpose, for error messages; if it is given, exclude other operations on managed
    workloads."""
    names = values.texts("names", names)
    if len(set(names)) != len(names) or not names:
        raise UsageError("invalid workload names: expected at least one workload, and each only once")
    async with AsyncExitStack() as stack:
        targets = []
        for name in names:
            targets.append(stack.enter_context(await open_target_async(name)))
            if work is not None and targets[-1].workload is not None:
                stack.enter_context(Registry().folder(name).exclusively(work))
        pids = [pid for target in targets for pid in target.pids]
        if len(set(pids)) != len(pids):
            raise UsageError("invalid workload names: two of them refer to the same process; remove one of them")
        yield targets
