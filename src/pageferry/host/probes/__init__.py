"""Features that this kernel allows for this user, determined by trying them (`pageferry check`).

Versions are never compared, because distributions backport and disable features. Each probe performs the real operation
on its own memory: a trace must report a write, a collapse must produce a huge page in the page table. No probe changes
a machine-wide setting.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pageferry.host.probes import machine, pages, processes, userfault
from pageferry.host.probes.child import DEADLINE, Unavailable, run_all
from pageferry.host.probes.probe import Probe

__all__ = ["PROBES", "Feature", "Probe", "Unavailable", "check_features"]

PROBES: tuple[Probe, ...] = (*userfault.PROBES, *pages.PROBES, *processes.PROBES, *machine.PROBES)
"""All probes, in the order in which their results are shown."""


class Feature(msgspec.Struct, frozen=True, rename="kebab"):
    """Result of the probe of a kernel feature."""

    name: str
    available: bool
    detail: str
    """Observation, or the reason why the feature is unavailable."""
    remedy: str | None = None
    """Action that makes the feature available; None if it is available."""


def check_features(probes: Sequence[Probe] = PROBES, deadline: float = DEADLINE) -> dict[str, Feature]:
    """Probe features, and return the results by name. The function takes at most `deadline` seconds, and far less
    unless a probe blocks.

    This function forks, so no other thread may be running.
    """
    outcomes = run_all([probe.attempt for probe in probes], deadline)
    return {
        probe.name: Feature(probe.name, outcome.available, outcome.detail, probe.remedy_for(outcome))
        for probe, outcome in zip(probes, outcomes, strict=True)
    }
