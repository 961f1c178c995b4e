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
    """Address in the process."""
    region: str
    """Name of its memory: of the workload's region, or as in /proc/PID/maps."""
    kind: str
    """`shared` or `anon`."""
    activity: int
    """Number of base pages accessed in the window, of 512."""
    touched: str | None
    """Accessed base pages: 512 bits in hexadecimal, bit 0 for the first. None for private memory, which yields only
    their number."""
    decision: Decision


class Overhead(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Cost of sampling."""

    cpu_ms: float
    """CPU time of this command's thread, milliseconds."""
    fraction: float
    """CPU time as a fraction of one CPU, over the duration of the rounds."""
    budget: float | None
    faults: int
    """Page faults caused in the workload, of about 1 us each."""
    per_page_us: float
    """CPU time per sampled page, microseconds."""


class StoreFigures(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Statistics of a store."""

    path: str
    """Image that was written; empty if no page was cold."""
    bytes: int
    """Length of the image. On a tmpfs it occupies memory, which reduces the gain."""
    pages: int
    """Base pages whose only copy this reclaim has moved to the store."""
    equal: int
    """Base pages of the image that are identical to another one, and stored once."""
    written: int
    """Base pages that stay in memory because they were written after they had been copied."""
    pauses: int
    longest_pause_ms: float


class RegionActivity(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Activity of a region."""

    name: str
    kind: str
    bytes: int
    large_pages: int
    """Number of huge pages mapped as such."""
    sampled: int
    idle: int
    """Number of samples without accesses."""
    mean: float
    """Base pages accessed per sample."""


class SampleEvent(Event, frozen=True, kw_only=True, tag="sample-round"):
    """A round has ended and its mappings are restored."""

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
    """Number of huge mappings that were split for a window and are restored."""
    not_restored: int
    """Number of huge mappings that could not be restored."""
    overhead: Overhead
    skipped: list[str]
    """Memory that was excluded, with the reason."""
    store: StoreFigures | None = None
    limited_by: Literal["budget", "mappings"] | None = None
    """Why rounds were smaller than `sample` allows: the CPU budget, or the number of mappings of a process."""


class BroughtBack(Event, frozen=True, kw_only=True, tag="large-pages-undo"):
    """Result of `pageferry large-pages --undo`."""

    target: str
    reloaded: int
    """Memory reloaded from the store, bytes."""
