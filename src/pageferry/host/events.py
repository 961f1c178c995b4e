"""Result of `pageferry check`."""

from __future__ import annotations

from pageferry.events import Event
from pageferry.host.probes import Feature
from pageferry.host.probes.systems import SystemReport
from pageferry.host.qemus import Qemu


class Check(Event, frozen=True, tag="check"):
    """Features, systems and QEMU binaries of this host."""

    kernel: str
    """Release of the kernel; informative only."""
    user: int
    """Effective user id."""
    features: list[Feature]
    systems: list[SystemReport]
    qemu: list[Qemu]
    main_job: bool
    """Whether arenas can be migrated live, and guests too if this host has a usable QEMU."""
    reason: str | None
    """Reason why live migration cannot run, with a remedy; None if it can."""
