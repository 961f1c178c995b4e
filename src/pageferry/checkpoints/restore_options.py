"""Options of restores."""

from __future__ import annotations

from dataclasses import dataclass

from pageferry import values
from pageferry.checkpoints.options import Disks
from pageferry.errors import UsageError
from pageferry.options import check
from pageferry.workloads.arena.options import ArenaOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions:
    """Options of the restore of a guest, the same as those of `pageferry restore`. Raises UsageError."""

    eager: bool = False
    """Load in the background at full speed, without yielding to accesses."""
    prefetch: bool = True
    """Load pages in the background; otherwise only accessed pages are loaded."""
    detach: bool = True
    """Run QEMU in a separate session, with its output in a log; otherwise on the terminal of this process."""
    hugetlb: bool = False
    """Place guest memory in reserved 2 MiB pages (hugetlbfs)."""
    disks: Disks = "checked"
    """Require disks that are known to be unchanged since the checkpoint (docs/disks.md), or accept them as they are."""
    paused: bool = False
    """Leave the guest paused, even if it ran when it was saved."""
    resume: bool = False
    """Run the guest, even if it was paused when it was saved. Without `paused` and `resume`, the guest is in the state
    in which it was saved."""

    def __post_init__(self) -> None:
        check(self)
        if self.paused and self.resume:
            raise UsageError("`paused` cannot be combined with `resume`: remove one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredArenaOptions(ArenaOptions):
    """Options of the restore of an arena. Raises UsageError."""

    eager: bool = False
    """Load in the background at full speed, without yielding to accesses."""
    prefetch: bool = True
    """Load pages in the background; otherwise only accessed pages are loaded."""

    def __post_init__(self) -> None:
        ArenaOptions.__post_init__(self)
        values.flag("eager", self.eager)
        values.flag("prefetch", self.prefetch)
