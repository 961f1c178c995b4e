"""Events and results of `pageferry sharing`: scans, merges and their undoing."""

from __future__ import annotations

import msgspec

from pageferry.events import Event


class ScanEvent(Event, frozen=True, tag="scan"):
    """Progress of a scan."""

    done: int
    """Scanned memory, bytes."""
    total: int
    """Memory to scan, bytes."""


class ApplyEvent(Event, frozen=True, tag="apply"):
    """A step of sharing begins."""

    step: str
    detail: str = ""


class Class(msgspec.Struct, frozen=True, rename="kebab"):
    """Pages of a class."""

    pages: int
    """Number of base pages that have duplicates; for class `zero`, number of all zero pages."""
    reclaimable: int
    """Memory that sharing these pages would free, bytes."""


class Point(msgspec.Struct, frozen=True, rename="kebab"):
    """Point of the curve: memory that splitting the best huge pages would free, bytes."""

    large_pages: int
    """Number of huge pages split; 0 for the memory that can be freed outside of huge pages."""
    reclaimable: int
    """Memory freed if all classes could be shared."""
    possible: int
    """Memory that `--apply` can free: anonymous memory through KSM, zeros of shared files by punching holes."""


class ScanReport(msgspec.Struct, frozen=True, rename="kebab"):
    """Parameters and extent of a scan."""

    scanned: int
    """Scanned memory, bytes."""
    ms: float
    every: int
    """Sampling ratio N: one of N 2 MiB units was scanned. Classes and curve refer to the scanned units only."""
    scale: int
    """Sampling ratio N: one of N contents was recorded, chosen by hash; counts are scaled up."""


class SharingResult(Event, frozen=True, tag="sharing", omit_defaults=True):
    """Memory that sharing could free, and has freed. All sizes are in bytes."""

    workloads: list[str]
    memory: int
    """Memory present and scanned."""
    large_pages: int
    """Number of huge pages scanned."""
    already_shared: int
    """Memory not scanned because processes have shared it since a fork, or KSM has merged it."""
    reclaimable: int
    """Memory that sharing all classes would free, if every huge page with a shareable page were split."""
    possible: int
    """Part of `reclaimable` that `--apply` can free."""
    classes: dict[str, Class]
    """Statistics by class: `zero`, `pattern`, `inside` (duplicates within a workload), `across` (duplicates in other
    workloads only)."""
    curve: list[Point]
    """Curve of memory freed over the number of huge pages split, in order of decreasing gain."""
    scan: ScanReport
    threshold: int
    """Minimum number of shareable base pages for which a huge page is split, as requested or from the available
    memory."""
    not_shareable: list[str]
    """Limits of sharing on this host, with the reason."""
    deferred: int = 0
    """Deferred memory of workloads that are being restored. It is scanned by the signatures in the image, and not
    loaded."""
    freed: int | None = None
    """Memory freed: decrease of the PSS of processes, for anonymous memory, and of the allocated blocks of files. None
    without `--apply`, as for all following fields."""
    estimated: int | None = None
    """Estimate of the memory freed in the chosen huge pages."""
    large_pages_chosen: int | None = None
    large_pages_broken: int | None = None
    ksm_scans: int | None = None
    """Number of full scans of KSM over the chosen ranges."""
    ksm_cpu_ms: float | None = None
    """CPU time of ksmd during the run, milliseconds."""
    longest_pause_ms: float | None = None
    """Longest pause of a workload to punch out zeros of its files, milliseconds."""
    pauses: int | None = None


class Undone(Event, frozen=True, tag="sharing-undone"):
    """Result of `pageferry sharing --undo`."""

    workloads: list[str]
    bytes: int
    """Size of the memory that is no longer shared, bytes."""
