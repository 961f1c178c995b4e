"""Table of the ten systems, and the kernel mechanism that each of them uses on this host.

The table lists the possible mechanisms of each system, best first, and the features (pageferry.host.probes) that each
mechanism requires. A mechanism that requires no feature is the behaviour without the system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from pageferry.host.probes import Feature

Status = Literal["ok", "fallback", "unavailable"]

ADOPT = ("ptrace", "pidfd-getfd", "adopt")
"""Features for access to the memory of another process."""
ARENAS_MOVE = ("userfaultfd", "uffd-wp-async-shmem", "pagemap-scan")
"""Features without which arenas cannot be migrated."""
GUESTS_MOVE = (*ARENAS_MOVE, *ADOPT)
"""Features without which guests cannot be migrated."""


@dataclass(frozen=True, slots=True)
class Mechanism:
    """Kernel mechanism that can implement a system."""

    text: str
    needs: tuple[str, ...] = ()
    """Names of the required features."""


@dataclass(frozen=True, slots=True)
class System:
    """System with its possible mechanisms."""

    number: str
    title: str
    mechanisms: tuple[Mechanism, ...]
    """Mechanisms, best first."""


_FAULTS = ("userfaultfd-kernel-faults",)
"""Feature with which system calls and KVM wait at a fault instead of failing."""
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
    System("S1", "Page tables populated before resume", _POPULATE),
    System("S2", "Write traces with little CPU time", (
        Mechanism("userfaultfd WP_ASYNC, read by PAGEMAP_SCAN",
                  GUESTS_MOVE),
        Mechanism("userfaultfd WP_ASYNC, in arenas of the program itself only", ARENAS_MOVE),
    )),
    System("S3", "Reclaim from huge pages with low activity", (
        Mechanism("PMD mappings split by write protection, PAGEMAP_SCAN, MADV_COLLAPSE to restore them",
                  (*GUESTS_MOVE, "madv-collapse-remote", "break-large-page")),
        Mechanism("PMD mappings split by write protection, in arenas of the program itself only",
                  (*ARENAS_MOVE, "madv-collapse", "break-large-page")),
    )),
    System("S4", "Lazy checkpoint", (
        Mechanism("synchronous userfaultfd write protection",
                  (*_FAULTS, "uffd-wp-sync", *ADOPT)),
        Mechanism("synchronous userfaultfd write protection, in arenas of the program itself only",
                  (*_FAULTS, "uffd-wp-sync")),
        Mechanism("none: the workload is paused while it is saved (--mode stop)"),
    )),
    System("S5", "Page tables populated during transmission", _POPULATE),
    System("S6", "Huge pages stay contiguous: pages of zeros", _KEEP_LARGE),
    System("S7", "Huge pages stay contiguous: pages sent again", _KEEP_LARGE),
    System("S8", "Deferred contents behind page metadata", (
        Mechanism("userfaultfd MISSING and MINOR faults",
                  (*_DEFERS, *ADOPT)),
        Mechanism("userfaultfd MISSING and MINOR faults, in arenas of the program itself only", _DEFERS),
        Mechanism("none: contents are loaded before the workload runs; no post-copy, no cold store"),
    )),
    System("S9", "Duplicate pages inside huge pages", (
        Mechanism("KSM on selected huge pages, MADV_MERGEABLE called in the process",
                  ("ksm", "break-large-page", *ADOPT)),
        Mechanism("zeros of guests and arenas freed, other duplicates estimated only"),
    )),
    System("S10", "Lazy restore", (
        Mechanism("userfaultfd MISSING and MINOR faults, POISON for pages that cannot be read",
                  (*_DEFERS, "uffd-poison", *ADOPT)),
        Mechanism("userfaultfd MISSING and MINOR faults; accesses to pages that cannot be read wait",
                  (*_DEFERS, *ADOPT)),
        Mechanism("userfaultfd MISSING and MINOR faults, in arenas of the program itself only", _DEFERS),
        Mechanism("none: all contents are loaded before the workload runs"),
    )),
)  # fmt: skip


class SystemReport(msgspec.Struct, frozen=True, rename="kebab"):
    """Mechanism of a system on this host."""

    system: str
    """Number of the system, S1 to S10."""
    title: str
    status: Status
    """`ok` if the best mechanism is available, `fallback` if another one is, `unavailable` if none is."""
    mechanism: str | None
    """Selected mechanism; None if there is none."""
    preferred: str
    """Best mechanism of the system."""
    missing: list[str]
    """Features that the best mechanism requires and that this host lacks."""


def choose(system: System, features: Mapping[str, Feature]) -> SystemReport:
    """Return the report of a system with the best mechanism that the available features allow."""
    best = system.mechanisms[0]
    chosen = next((way for way in system.mechanisms if not lacking(way.needs, features)), None)
    status: Status = "unavailable" if chosen is None else "ok" if chosen is best else "fallback"
    return SystemReport(
        system=system.number,
        title=system.title,
        status=status,
        mechanism=None if chosen is None else chosen.text,
        preferred=best.text,
        missing=lacking(best.needs, features),
    )


def lacking(needs: tuple[str, ...], features: Mapping[str, Feature]) -> list[str]:
    """Return the required features that are unavailable."""
    return [name for name in needs if not features[name].available]
