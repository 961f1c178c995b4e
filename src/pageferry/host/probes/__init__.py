"""What this kernel and this user allow, found out by trying (`pageferry check`).

No version is ever compared: a kernel with a feature taken back, or one with it brought forward, is what it does. Every
probe does the real thing to memory of its own: a trace has to show a write that was made, a collapse to show a large
page in the page table. No switch of the machine is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pageferry.host.probes import machine, pages, processes, userfault
from pageferry.host.probes.child import DEADLINE, Unavailable, run_all
from pageferry.host.probes.probe import Probe

__all__ = ["PROBES", "Feature", "Probe", "Unavailable", "check_features"]

PROBES: tuple[Probe, ...] = (*userfault.PROBES, *pages.PROBES, *processes.PROBES, *machine.PROBES)
"""All of them, in the order in which they are shown."""


class Feature(msgspec.Struct, frozen=True, rename="kebab"):
    """What was found about a feature of the kernel."""

    name: str
    available: bool
    detail: str
    """What was seen, or why it does not work."""
    remedy: str | None = None
    """What to do about it; None where it works."""


def check_features(probes: Sequence[Probe] = PROBES, deadline: float = DEADLINE) -> dict[str, Feature]:
    """Try features, by name. Takes `deadline` seconds at most, and much less unless something hangs.

    Forks; to be called where no other thread runs.
    """
    outcomes = run_all([probe.attempt for probe in probes], deadline)
    return {
        probe.name: Feature(probe.name, outcome.available, outcome.detail, probe.remedy_for(outcome))
        for probe, outcome in zip(probes, outcomes, strict=True)
    }
