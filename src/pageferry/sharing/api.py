"""Page sharing in a few calls: what the command uses, and Python programs too (as `pageferry.sharing.*`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from pageferry import values
from pageferry.errors import UsageError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import in_thread
from pageferry.host.meminfo import available
from pageferry.host.registry import Registry
from pageferry.pager import records
from pageferry.pager.records import Deferred
from pageferry.sharing import apply, estimate, policy, ranges
from pageferry.sharing.events import SharingResult
from pageferry.sharing.scan import Options, look
from pageferry.workloads.deferred_access import wait_complete
from pageferry.workloads.folders import folder_of
from pageferry.workloads.target import Target, open_target


async def find(
    names: Sequence[str], options: Options | None = None, *, threshold: int | None = None, listener: Listener = ignore
) -> SharingResult:
    """What sharing within these targets (`NAME` or `pid:N`), and between them if there are several, could free.

    `threshold`: pages that must be shareable in a large page for it to be worth breaking; None: by the memory that is
    free. Raises what `open_target` and `look` raise.
    """
    _check(options, listener, threshold)
    async with _opened(names) as targets:
        findings = await look(targets, options or Options(), listener)
        return estimate.result(findings, _threshold(threshold))


async def share(
    names: Sequence[str],
    options: Options | None = None,
    *,
    threshold: int | None = None,
    most: int | None = None,
    beside_others: bool = False,
    hot: Collection[tuple[int, int]] = frozenset(),
    listener: Listener = ignore,
) -> SharingResult:
    """Find, then share in the large pages that are worth it, `most` of them at most; the others stay as they are.

    Several targets are shared between only because all are named: whoever shares pages can tell by the time that its
    writes take whether another has the same content. `beside_others`: memory that processes which were not named have
    offered to KSM may be merged as well. `hot`: large pages that are in use (S3) and stay whole, as (number of the
    target, address or byte of its region). A restore that is under way is completed first (S8). Raises also
    UnsupportedError where KSM is needed and in use.
    """
    _check(options, listener, threshold)
    values.optional(values.count, "most", most, 0, 1 << 40)
    values.flag("beside_others", beside_others)
    async with _opened(names, "sharing") as targets:
        apply.check_possible(targets, beside_others)
        for target in targets:
            await _complete(target)
        findings = await look(targets, options or Options(), listener)
        least = _threshold(threshold)
        found = estimate.result(findings, least)
        chosen = policy.choose(findings.units, least, hot, most)
        expected = estimate.freed_by(findings, chosen)
        done = await apply.apply(findings, chosen, listener, beside_others=beside_others)
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


async def undo(names: Sequence[str]) -> int:
    """Take sharing back: merged pages are copied again, large pages allowed and made. Bytes that this was done for."""
    async with _opened(names, "the end of sharing") as targets:
        return sum([await in_thread(ranges.undo, target) for target in targets])


async def _complete(target: Target) -> None:
    """Have all of it in memory that comes by itself; what is in a cold store stays there."""
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
    """The targets, kept from other commands while `work` is done on them."""
    names = values.texts("names", names)
    if len(set(names)) != len(names) or not names:
        raise UsageError("name each workload once, and at least one")
    async with AsyncExitStack() as stack:
        targets = []
        for name in names:
            targets.append(stack.enter_context(await open_target(name)))
            if work is not None and targets[-1].workload is not None:
                stack.enter_context(Registry().folder(name).exclusively(work))
        pids = [pid for target in targets for pid in target.pids]
        if len(set(pids)) != len(pids):
            raise UsageError("two of the names stand for the same process")
        yield targets
