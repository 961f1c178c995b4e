"""Python API of page sharing (`pageferry.sharing`), which the command uses too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

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
from pageferry.sharing.options import Options
from pageferry.sharing.scan import look
from pageferry.workloads.deferred_access import wait_complete
from pageferry.workloads.folders import folder_of
from pageferry.workloads.target import Target, open_target_async


async def find_async(
    names: Sequence[str], options: Options | None = None, *, threshold: int | None = None, listener: Listener = ignore
) -> SharingResult:
    """Estimate how much memory sharing could free, within these targets (`NAME` or `pid:N`) and between them.

    `threshold`: minimum number of shareable base pages for which splitting a huge page pays; None to derive it from the
    available memory. Raises the errors of `open_target` and `look`.
    """
    _check(options, listener, threshold)
    async with _opened(names) as targets:
        findings = await look(targets, options or Options(), listener)
        return estimate.result(findings, _threshold(threshold))


find = synchronous(find_async)


async def share_async(
    names: Sequence[str],
    options: Options | None = None,
    *,
    threshold: int | None = None,
    max_large_pages: int | None = None,
    merge_with_others: bool = False,
    hot: Collection[tuple[int, int]] = frozenset(),
    listener: Listener = ignore,
) -> SharingResult:
    """Scan, then share in the huge pages where it pays, at most `max_large_pages` of them.

    Pages are shared between the targets because the caller has named all of them: a process that shares pages can infer
    from the duration of its writes whether another has the same contents. `merge_with_others`: also allow merging with
    memory that other processes have offered to KSM. `hot`: huge pages in use (S3), which are not split, as (number of
    the target, address or byte offset in its region). A restore in progress is completed first (S8). Also raises
    UnsupportedError if KSM is needed and in use.
    """
    _check(options, listener, threshold)
    values.optional(values.count, "max_large_pages", max_large_pages, 0, 1 << 40)
    values.flag("merge_with_others", merge_with_others)
    async with _opened(names, "sharing") as targets:
        apply.check_possible(targets, merge_with_others)
        for target in targets:
            await _complete(target)
        findings = await look(targets, options or Options(), listener)
        least = _threshold(threshold)
        found = estimate.result(findings, least)
        chosen = policy.choose(findings.units, least, hot, max_large_pages)
        expected = estimate.freed_by(findings, chosen)
        done = await apply.apply(findings, chosen, listener, merge_with_others=merge_with_others)
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


share = synchronous(share_async)


async def undo_async(names: Sequence[str]) -> int:
    """Undo sharing: copy merged pages, allow huge pages, and collapse to them. Return the bytes processed."""
    async with _opened(names, "the end of sharing") as targets:
        return sum([await in_thread(ranges.undo, target) for target in targets])


undo = synchronous(undo_async)


async def _complete(target: Target) -> None:
    """Complete a restore; memory in a cold store stays there."""
    if target.workload is not None:
        folder = folder_of(target.workload)
        record = folder.load(records.RECORD, Deferred) if folder is not None else None
        if record is None or record.cold is None:
            await wait_complete(target.workload, traces=False)


def _check(options: Options | None, listener: Listener, threshold: int | None) -> None:
    values.optional(values.instance, "options", options, Options)
    values.function("listener", listener)
    values.optional(values.count, "threshold", threshold, 1, 512)


def _threshold(asked: int | None) -> int:
    if asked is None:
        return policy.threshold(available())
    return asked


@asynccontextmanager
async def _opened(names: Sequence[str], work: str | None = None) -> AsyncIterator[list[Target]]:
    """Open the targets, exclusively if they are named and `work` is given."""
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
            raise UsageError("invalid workload names: two of them refer to the same process")
        yield targets
