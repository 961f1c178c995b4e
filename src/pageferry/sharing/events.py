"""What a scan and an application of sharing tell, on the way and at the end."""

from __future__ import annotations

import msgspec

from pageferry.events import Event


class ScanEvent(Event, frozen=True, tag="scan"):
    """How far a scan is."""

    done: int
    """Bytes."""
    total: int


class ApplyEvent(Event, frozen=True, tag="apply"):
    """A step of an application."""

    step: str
    detail: str = ""


class Class(msgspec.Struct, frozen=True, rename="kebab"):
    """Pages of one kind."""

    pages: int
    """Of 4 KiB, that stand elsewhere too (zeros: all of them)."""
    reclaimable: int
    """Bytes that sharing them would free."""


class Point(msgspec.Struct, frozen=True, rename="kebab"):
    """A point of the curve: what breaking the best so many large pages would free, in bytes."""

    large_pages: int
    """Broken; 0: what can be had outside of large pages."""
    reclaimable: int
    """Of all classes, if everything could be shared."""
    possible: int
    """By what `--apply` does here: anonymous memory by KSM, zeros of shared files by holes."""


class ScanReport(msgspec.Struct, frozen=True, rename="kebab"):
    """How the scan was done."""

    looked_at: int
    """Bytes."""
    ms: float
    every: int
    """One of so many units of 2 MiB was looked at; classes and curve are of these alone."""
    scale: int
    """One of so many contents was kept in mind; counts are scaled up."""


class SharingResult(Event, frozen=True, tag="sharing", omit_defaults=True):
    """What sharing could free, and after an application, what it has freed. All sizes in bytes."""

    workloads: list[str]
    memory: int
    """In memory and looked at."""
    large_pages: int
    """Among what was looked at."""
    already_shared: int
    """Looked past: pages that processes share by fork, or KSM has merged."""
    reclaimable: int
    """All classes, with every large page broken that holds such a page."""
    possible: int
    """That part of it which can be had here."""
    classes: dict[str, Class]
    """`zero`, `pattern`, `inside` (equal within a workload), `across` (equals in other workloads only)."""
    curve: list[Point]
    """Best large pages first."""
    scan: ScanReport
    threshold: int
    """Pages that must be shareable in a large page for it to be broken, by the memory that is free now."""
    not_shareable: list[str]
    """What cannot be shared here, and why."""
    deferred: int = 0
    """Still to come to a workload that is being restored, and counted by the signatures in its image: not loaded."""
    freed: int | None = None
    """By the processes' PSS (anonymous memory) and the files' blocks."""
    estimated: int | None = None
    """What the estimate said of the large pages that were chosen."""
    large_pages_chosen: int | None = None
    large_pages_broken: int | None = None
    ksm_scans: int | None = None
    """Full scans of KSM over the chosen ranges."""
    ksm_cpu_ms: float | None = None
    """CPU time of ksmd meanwhile."""
    longest_pause_ms: float | None = None
    """Of a workload, while zeros of its files were given back."""
    pauses: int | None = None
