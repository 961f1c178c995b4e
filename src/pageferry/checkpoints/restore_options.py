"""Options of restores."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from pageferry.options import check
from pageferry.workloads.arena.arena import State
from pageferry.workloads.arena.arguments import check_arena
from pageferry.workloads.callbacks import Callback, Plain


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions:
    """Options of the restore of a guest, as those of `pageferry restore`. Raises UsageError."""

    eager: bool = False
    """Load in the background at full speed, without yielding to accesses."""
    prefetch: bool = True
    """Load pages in the background; otherwise only accessed pages are loaded."""
    detach: bool = True
    """Run QEMU in a separate session, with its output in a log; otherwise on the terminal of this process."""
    hugetlb: bool = False
    """Place guest memory in reserved 2 MiB pages (hugetlbfs)."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaOptions:
    """Options of the restore of an arena; those of `Arena` have the same meaning. Raises UsageError."""

    name: str | None = None
    eager: bool = False
    """Load in the background at full speed, without yielding to accesses."""
    prefetch: bool = True
    """Load pages in the background; otherwise only accessed pages are loaded."""
    state: State | None = None
    on_pause: Callback | None = None
    on_resume: Plain | None = None
    on_moved: Plain | None = None
    direct_io: bool = True
    loop: asyncio.AbstractEventLoop | None = None

    def __post_init__(self) -> None:
        flags = {"eager": self.eager, "prefetch": self.prefetch}
        check_arena(self.name, self.state, self.on_pause, self.on_resume, self.on_moved, **flags)

    def arena(self) -> dict[str, Any]:
        """Return the arguments of `Arena`, without the name."""
        names = ("state", "on_pause", "on_resume", "on_moved", "direct_io", "loop")
        return {name: getattr(self, name) for name in names}
