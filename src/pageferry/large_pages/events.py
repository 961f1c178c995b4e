"""What sampling of large pages tells on the way and at its end."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.events import Event
from pageferry.large_pages.estimate import Estimate
from pageferry.large_pages.policy import Decision


class Sample(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A large page that was looked at."""

    pid: int
    address: int
    """In the process."""
    region: str
    """Name of the memory it is in: of the workload's region, or as in /proc/PID/maps."""
    kind: str
    """`shared` or `anon`."""
    activity: int
    """Distinct small pages accessed in the window, of 512."""
    touched: str | None
    """Which: 512 bits in hexadecimal, the lowest is the first page. None: private memory gives their number only."""
    decision: Decision


class Overhead(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What looking costs."""

    cpu_ms: float
    """Of this command's thread, milliseconds."""
    fraction: float
    """Of one CPU, over the time that the rounds took."""
    budget: float | None
    faults: int
    """Faults that the workload took for it, of about a microsecond each."""
    per_page_us: float
    """CPU per sampled page, microseconds."""


class StoreFigures(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What went to a store."""

    path: str
    """The image that was written; empty where nothing was cold."""
    bytes: int
    """Length of the image. Where it is in memory itself (a tmpfs), that is taken off what was gained."""
    pages: int
    """Small pages that are there only, since this reclaim."""
    equal: int
    """Small pages of the image that equal another one: their contents are stored once."""
    written: int
    """Small pages that stay, because they were written to after they had been copied."""
    pauses: int
    longest_pause_ms: float


class RegionActivity(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A region in numbers."""

    name: str
    kind: str
    bytes: int
    large_pages: int
    """Mapped as such."""
    sampled: int
    idle: int
    """Samples without any access."""
    mean: float
    """Small pages accessed per sample."""


class SampleEvent(Event, frozen=True, kw_only=True, tag="sample-round"):
    """A round is over and its mappings are back."""

    round: int
    sampled: int
    idle: int
    """Without any access."""
    mean: float
    cpu_ms: float


class LargePagesResult(Event, frozen=True, kw_only=True, tag="large-pages"):
    """The end of `pageferry large-pages`."""

    target: str
    window_ms: float
    rounds: int
    regions: list[RegionActivity]
    samples: list[Sample]
    histogram: list[int]
    """Samples with 0, 1, 2-3, 4-7, ..., 256-511, 512 small pages accessed."""
    estimate: Estimate
    """For all large pages."""
    reclaimed: int
    """Bytes that went to swap, or to a store: by what the workload has in swap, or its files in memory."""
    broken: int
    """Large pages that were broken for that."""
    restored: int
    """Large mappings that were split for a window and are back."""
    not_restored: int
    """Those that are not."""
    overhead: Overhead
    skipped: list[str]
    """Memory that was left out, and why."""
    store: StoreFigures | None = None
    limited_by: Literal["budget", "mappings"] | None = None
    """Why rounds were smaller than the sample asks for: the budget of CPU time, or the mappings of a process."""


class BroughtBack(Event, frozen=True, kw_only=True, tag="large-pages-undo"):
    """The end of `pageferry large-pages --undo`."""

    target: str
    brought_back: int
    """Bytes that were in a store, and are in memory again."""
