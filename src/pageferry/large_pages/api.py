"""Sampling and reclaim of huge pages (S3): measure their use, and split and reclaim those that the policy selects."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pageferry import values
from pageferry.events import Listener, ignore
from pageferry.host.blocking import in_thread, synchronous
from pageferry.host.proc import available
from pageferry.large_pages import cold_store, swap
from pageferry.large_pages.estimate import estimate
from pageferry.large_pages.events import (
    BroughtBack,
    LargePagesResult,
    Overhead,
    RegionActivity,
    Sample,
    SampleEvent,
    StoreFigures,
)
from pageferry.large_pages.options import Options
from pageferry.large_pages.policy import Decision, Facts, Policy, Threshold
from pageferry.large_pages.sampler import Activity, LargePage, Tracker
from pageferry.large_pages.selection import Limit, Sampling
from pageferry.large_pages.store_move import Stored
from pageferry.workloads import persistent_trace
from pageferry.workloads.target import Target

BINS = 11
"""Number of bins of the histogram: 0, 1, 2-3, ..., 256-511, 512 base pages."""


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Samples of all rounds, with the decision of the policy about each."""

    candidates: list[LargePage]
    activities: list[Activity]
    decisions: list[Decision]
    rounds: int
    limited_by: Limit | None
    elapsed: float


async def sample_async(
    target: Target,
    options: Options | None = None,
    *,
    policy: Policy | None = None,
    sharing: Mapping[tuple[int, int], int] | None = None,
    listener: Listener = ignore,
) -> LargePagesResult:
    """Sample huge pages of a target in rounds; with `reclaim`, split those that the policy selects and reclaim their
    cold base pages.

    `sharing`: number of base pages of a huge page that have duplicates (S9), by (pid, address), if known. Every split
    mapping is restored before this function returns or raises. Raises UsageError, UnsupportedError, WorkloadDied,
    WorkloadError, and CheckpointError if a store cannot be written.

    Examples:
        >>> import subprocess, pageferry
        >>> program = subprocess.Popen(["sleep", "60"])
        >>> options = pageferry.large_pages.Options(rounds=1, window="10ms")
        >>> with pageferry.large_pages.open_target(f"pid:{program.pid}") as target:
        ...     found = pageferry.large_pages.sample(target, options)
        >>> len(found.samples)  # sleep uses no huge pages
        0
        >>> program.kill()
        >>> program.wait()
        -9
    """
    values.instance("target", target, Target)
    values.optional(values.instance, "options", options, Options)
    values.optional(values.instance, "sharing", sharing, Mapping)
    values.function("listener", listener)
    if policy is not None:
        values.function("policy", getattr(policy, "decide", None))
    options = options or Options()
    if options.reclaim == "swap":
        swap.check_swap()
    elif options.reclaim == "store":
        await cold_store.prepare(target)
    if target.workload is not None:
        await in_thread(persistent_trace.forget, target.workload)  # its registration would prevent sampling
    tracker = Tracker(target)
    sampled = await _sample_all(tracker, options, policy or Threshold(), sharing or {}, listener)
    broken, reclaimed, store = await _reclaim(target, options, sampled)
    return _result(tracker, options, sampled, broken=broken, reclaimed=reclaimed, store=store)


sample = synchronous(sample_async)


async def _sample_all(
    tracker: Tracker,
    options: Options,
    policy: Policy,
    sharing: Mapping[tuple[int, int], int],
    listener: Listener,
) -> _Sampled:
    candidates = tracker.large_pages()
    begin = time.monotonic()
    seen, rounds, limited_by = await _run_rounds(tracker, candidates, options, listener)
    elapsed = time.monotonic() - begin
    return _Sampled(candidates, seen, _decide(seen, policy, sharing), rounds, limited_by, elapsed)


async def _run_rounds(
    tracker: Tracker, candidates: Sequence[LargePage], options: Options, listener: Listener
) -> tuple[list[Activity], int, Limit | None]:
    """Run the rounds. Return the activities, the number of rounds, and the limit that made a round smaller (None if
    none did)."""
    sampling = Sampling(options.sample, options.budget, options.seed)
    seen: list[Activity] = []
    done = 0
    while done < options.rounds and (pages := sampling.choose(candidates, options.window)):
        cpu = tracker.cpu
        activities = await tracker.window(pages, options.window)
        sampling.account(pages, tracker.cpu - cpu)
        seen += activities
        done += 1
        listener(_event(done, activities, tracker.cpu - cpu))
    return seen, done, sampling.limited_by


def _decide(seen: Sequence[Activity], policy: Policy, sharing: Mapping[tuple[int, int], int]) -> list[Decision]:
    free = available()
    return [
        policy.decide(
            Facts(activity=one.count, sharing=sharing.get((one.page.area.pid, one.page.address), 0), free=free)
        )
        for one in seen
    ]


async def _reclaim(target: Target, options: Options, sampled: _Sampled) -> tuple[int, int, StoreFigures | None]:
    """Reclaim the pages that the policy has selected. Return the number of huge pages split, the number of bytes freed,
    and the statistics of the store (None without a store)."""
    pairs = zip(sampled.activities, sampled.decisions, strict=True)
    idle = [activity for activity, decision in pairs if decision == "break"]
    if options.reclaim == "swap":
        return *swap.to_swap(target, idle), None
    if options.reclaim == "store":
        stored = await cold_store.to_store(target, idle, options.store, options.codec)
        return stored.broken, stored.freed, _figures(stored)
    return 0, 0, None


def _result(
    tracker: Tracker, options: Options, sampled: _Sampled, *, broken: int, reclaimed: int, store: StoreFigures | None
) -> LargePagesResult:
    target, seen = tracker.target, sampled.activities
    return LargePagesResult(
        target=target.name,
        window_ms=options.window * 1e3,
        rounds=sampled.rounds,
        regions=_regions(target, sampled.candidates, seen),
        samples=[_sample(activity, decision) for activity, decision in zip(seen, sampled.decisions, strict=True)],
        histogram=_histogram(seen),
        estimate=estimate([activity.count for activity in seen], len(sampled.candidates)),
        reclaimed=reclaimed,
        broken=broken,
        restored=tracker.restored,
        not_restored=len(tracker.small),
        overhead=_overhead(tracker, seen, sampled.elapsed, options.budget),
        skipped=list(target.skipped),
        store=store,
        limited_by=sampled.limited_by,
    )


async def undo_async(target: Target) -> BroughtBack:
    """Reload all pages that are in a store, collapse them to huge pages, and remove the store.

    Raises UsageError if there is no store, RestoreError if its pager has exited, ImageError if it is damaged.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("4MiB")
        >>> with pageferry.large_pages.workload_target(arena.workload()) as target:
        ...     pageferry.large_pages.undo(target)  # nothing was moved to a store
        Traceback (most recent call last):
        pageferry.errors.NoSuchWorkload: ...
    """
    values.instance("target", target, Target)
    return BroughtBack(target=target.name, reloaded=await cold_store.bring_back(target))


undo = synchronous(undo_async)


def _figures(stored: Stored) -> StoreFigures:
    return StoreFigures(
        path=stored.path,
        bytes=stored.length,
        pages=stored.pages,
        equal=stored.equal,
        written=stored.written,
        pauses=stored.pauses,
        longest_pause_ms=stored.longest_pause * 1e3,
    )


def _event(number: int, activities: list[Activity], cpu: float) -> SampleEvent:
    return SampleEvent(
        round=number,
        sampled=len(activities),
        idle=sum(not activity.count for activity in activities),
        mean=_mean(activities),
        cpu_ms=cpu * 1e3,
    )


def _sample(activity: Activity, decision: Decision) -> Sample:
    area = activity.page.area
    return Sample(
        pid=area.pid,
        address=activity.page.address,
        region=area.name,
        kind=area.kind,
        activity=activity.count,
        touched=None if activity.touched is None else f"{activity.touched:0128x}",
        decision=decision,
    )


def _regions(target: Target, candidates: list[LargePage], seen: list[Activity]) -> list[RegionActivity]:
    """Return a row per region with huge pages; private memory of a process has one row per name."""
    large: defaultdict[tuple[str, str], int] = defaultdict(int)
    sampled: defaultdict[tuple[str, str], list[Activity]] = defaultdict(list)
    size: defaultdict[tuple[str, str], int] = defaultdict(int)
    for area in target.areas:
        size[area.name, area.kind] += area.length
    for page in candidates:
        large[page.area.name, page.area.kind] += 1
    for activity in seen:
        sampled[activity.page.area.name, activity.page.area.kind].append(activity)
    return [
        RegionActivity(
            name=name,
            kind=kind,
            bytes=size[name, kind],
            large_pages=count,
            sampled=len(sampled[name, kind]),
            idle=sum(not activity.count for activity in sampled[name, kind]),
            mean=_mean(sampled[name, kind]),
        )
        for (name, kind), count in large.items()
    ]


def _histogram(seen: list[Activity]) -> list[int]:
    bins = [0] * BINS
    for activity in seen:
        bins[activity.count.bit_length()] += 1
    return bins


def _overhead(tracker: Tracker, seen: list[Activity], elapsed: float, budget: float | None) -> Overhead:
    return Overhead(
        cpu_ms=tracker.cpu * 1e3,
        fraction=tracker.cpu / elapsed if elapsed else 0.0,
        budget=budget,
        faults=sum(activity.count for activity in seen if activity.page.area.kind == "shared"),
        per_page_us=tracker.cpu / len(seen) * 1e6 if seen else 0.0,
    )


def _mean(activities: list[Activity]) -> float:
    return sum(activity.count for activity in activities) / len(activities) if activities else 0.0
