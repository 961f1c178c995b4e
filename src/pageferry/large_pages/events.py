"""Events and results of sampling huge pages."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.events import Event
from pageferry.large_pages.estimate import Estimate
from pageferry.large_pages.policy import Decision


class Sample(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Sampled huge page."""

    pid: int
    address: int
    """Address of the huge page in the process."""
    region: str
    """Name of the memory: that of the workload's region, or of the mapping as in /proc/PID/maps."""
    kind: str
    """Kind of the memory: `shared` or `anon`."""
    activity: int
    """Number of base pages accessed in the window, of 512."""
    touched: str | None
    """Accessed base pages: 512 bits in hexadecimal, bit 0 for the first base page. None for private memory, for which
    only the number of accessed base pages is known."""
    decision: Decision


class Overhead(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Cost of sampling."""

    cpu_ms: float
    """CPU time of the sampling thread, milliseconds."""
    fraction: float
    """CPU time divided by the duration of the rounds, as a fraction of one CPU."""
    budget: float | None
    faults: int
    """Number of page faults that sampling has caused in the workload, about 1 us each."""
    per_page_us: float
    """CPU time per sampled page, microseconds."""


class StoreFigures(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Statistics of a store."""

    path: str
    """Path of the image that was written; empty if no page was cold."""
    bytes: int
    """Length of the image. An image on a tmpfs occupies memory, which reduces the gain."""
    pages: int
    """Number of base pages whose only copy this reclaim has moved to the store."""
    equal: int
    """Number of base pages of the image that are stored as duplicates of another page."""
    written: int
    """Number of base pages that stay in memory because they were written after they had been copied."""
    pauses: int
    longest_pause_ms: float


class RegionActivity(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Activity of a region."""

    name: str
    kind: str
    bytes: int
    large_pages: int
    """Number of huge pages with a PMD mapping."""
    sampled: int
    idle: int
    """Number of samples without accesses."""
    mean: float
    """Mean number of base pages accessed per sample."""


class SampleEvent(Event, frozen=True, kw_only=True, tag="sample-round"):
    """A round has ended, and the mappings that it had split are restored."""

    round: int
    sampled: int
    idle: int
    """Number of samples without accesses."""
    mean: float
    cpu_ms: float


class LargePagesResult(Event, frozen=True, kw_only=True, tag="large-pages"):
    """Result of `pageferry large-pages`."""

    target: str
    window_ms: float
    rounds: int
    regions: list[RegionActivity]
    samples: list[Sample]
    histogram: list[int]
    """Number of samples with 0, 1, 2-3, 4-7, ..., 256-511, 512 base pages accessed."""
    estimate: Estimate
    """Estimate for all huge pages."""
    reclaimed: int
    """Reclaimed memory, bytes: growth of the workload's swap usage, or decrease of its files in memory."""
    broken: int
    """Number of huge pages split for reclaim."""
    restored: int
    """Number of huge mappings that were split for a window and have been restored."""
    not_restored: int
    """Number of huge mappings that could not be restored."""
    overhead: Overhead
    skipped: list[str]
    """Memory that was excluded, with the reason."""
    store: StoreFigures | None = None
    limited_by: Literal["budget", "mappings"] | None = None
    """Reason why rounds were smaller than `sample` allows: the CPU budget, or the limit on the number of mappings of a
    process. None if they were not smaller."""


class BroughtBack(Event, frozen=True, kw_only=True, tag="large-pages-undo"):
    """Result of `pageferry large-pages --undo`."""

    target: str
    reloaded: int
    """Memory reloaded from the store, bytes."""
