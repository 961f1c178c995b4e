"""The ten systems, and which kernel mechanism each of them uses here.

One table says it all: what a system can be made of, best first, and which features (pageferry.host.probes) each way
needs. A way that needs nothing is what happens without the system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from pageferry.host.probes import Feature

Status = Literal["ok", "fallback", "unavailable"]

ADOPT = ("ptrace", "pidfd-getfd", "adopt")
"""What it takes to work on the memory of another process."""
ARENAS_MOVE = ("userfaultfd", "uffd-wp-async-shmem", "pagemap-scan")
"""Without these no arena migrates."""
GUESTS_MOVE = (*ARENAS_MOVE, *ADOPT)
"""Without these no guest does."""


@dataclass(frozen=True, slots=True)
class Mechanism:
    """A way to do it."""

    text: str
    needs: tuple[str, ...] = ()
    """Names of features."""


@dataclass(frozen=True, slots=True)
class System:
    """A row of the table."""

    number: str
    title: str
    included: bool
    """Whether this release of pageferry does it; the others say what the kernel would allow."""
    mechanisms: tuple[Mechanism, ...]
    """Best first."""


_FAULTS = ("userfaultfd-kernel-faults",)
"""Traps at which system calls and KVM wait, instead of failing."""
_DEFERS = (*_FAULTS, "uffd-missing-shmem", "uffd-minor-shmem")

_POPULATE = (
    Mechanism("MADV_COLLAPSE for huge pages, UFFDIO_CONTINUE for base pages",
              ("madv-collapse-remote", "uffd-minor-shmem", *ADOPT)),
    Mechanism("UFFDIO_CONTINUE, in base pages", ("uffd-minor-shmem", *ADOPT)),
    Mechanism("MADV_COLLAPSE and UFFDIO_CONTINUE, in arenas of the program itself only",
              ("madv-collapse", "uffd-minor-shmem")),
    Mechanism("none: every page is mapped on first access"),
)  # fmt: skip
_KEEP_LARGE = (
    Mechanism("huge pages of a tmpfs with huge=always", ("large-tmpfs", "madv-populate")),
    Mechanism("huge pages by MADV_COLLAPSE of a memfd", ("madv-collapse", "madv-populate")),
    Mechanism("huge pages of hugetlbfs, for guests with --hugetlb", ("hugetlb", "madv-populate")),
    Mechanism("none: base pages, counted in the result"),
)

SYSTEMS = (
    System("S1", "Page tables populated before resume", True, _POPULATE),
    System("S2", "Write traces with little CPU time", True, (
        Mechanism("userfaultfd WP_ASYNC, read by PAGEMAP_SCAN",
                  GUESTS_MOVE),
        Mechanism("userfaultfd WP_ASYNC, in arenas of the program itself only", ARENAS_MOVE),
    )),
    System("S3", "Reclaim from huge pages with low activity", True, (
        Mechanism("PMD mappings split by write protection, PAGEMAP_SCAN, MADV_COLLAPSE to restore them",
                  (*GUESTS_MOVE, "madv-collapse-remote", "break-large-page")),
        Mechanism("PMD mappings split by write protection, in arenas of the program itself only",
                  (*ARENAS_MOVE, "madv-collapse", "break-large-page")),
    )),
    System("S4", "Lazy checkpoint", True, (
        Mechanism("synchronous userfaultfd write protection",
                  (*_FAULTS, "uffd-wp-sync", *ADOPT)),
        Mechanism("synchronous userfaultfd write protection, in arenas of the program itself only",
                  (*_FAULTS, "uffd-wp-sync")),
        Mechanism("none: the workload is paused while it is saved (--mode stop)"),
    )),
    System("S5", "Page tables populated during transmission", True, _POPULATE),
    System("S6", "Huge pages stay contiguous: pages of zeros", True, _KEEP_LARGE),
    System("S7", "Huge pages stay contiguous: pages sent again", True, _KEEP_LARGE),
    System("S8", "Deferred contents behind page metadata", True, (
        Mechanism("userfaultfd MISSING and MINOR faults",
                  (*_DEFERS, *ADOPT)),
        Mechanism("userfaultfd MISSING and MINOR faults, in arenas of the program itself only", _DEFERS),
        Mechanism("none: contents are loaded before the workload runs; no post-copy, no cold store"),
    )),
    System("S9", "Duplicate pages inside huge pages", True, (
        Mechanism("KSM on selected huge pages, MADV_MERGEABLE called in the process",
                  ("ksm", "break-large-page", *ADOPT)),
        Mechanism("zeros of guests and arenas freed, other duplicates estimated only"),
    )),
    System("S10", "Lazy restore", True, (
        Mechanism("userfaultfd MISSING and MINOR faults, POISON for pages that cannot be read",
                  (*_DEFERS, "uffd-poison", *ADOPT)),
        Mechanism("userfaultfd MISSING and MINOR faults; accesses to pages that cannot be read wait",
                  (*_DEFERS, *ADOPT)),
        Mechanism("userfaultfd MISSING and MINOR faults, in arenas of the program itself only", _DEFERS),
        Mechanism("none: all contents are loaded before the workload runs"),
    )),
)  # fmt: skip


class SystemReport(msgspec.Struct, frozen=True, rename="kebab"):
    """What a system uses on this machine."""

    system: str
    """S1 to S10."""
    title: str
    included: bool
    """Whether this release does it."""
    status: Status
    """`ok`: in the best way. `fallback`: in another one. `unavailable`: not at all."""
    mechanism: str | None
    """The way; None where there is none."""
    preferred: str
    """The best way."""
    missing: list[str]
    """Features that the best way lacks here."""


def choose(system: System, features: Mapping[str, Feature]) -> SystemReport:
    """The best way for a system that those features allow."""
    best = system.mechanisms[0]
    chosen = next((way for way in system.mechanisms if not lacking(way.needs, features)), None)
    status: Status = "unavailable" if chosen is None else "ok" if chosen is best else "fallback"
    return SystemReport(
        system=system.number,
        title=system.title,
        included=system.included,
        status=status,
        mechanism=None if chosen is None else chosen.text,
        preferred=best.text,
        missing=lacking(best.needs, features),
    )


def lacking(needs: tuple[str, ...], features: Mapping[str, Feature]) -> list[str]:
    """Those of the needs that are not there."""
    return [name for name in needs if not features[name].available]
