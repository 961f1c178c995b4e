"""What this machine can do for pageferry: its features, the systems, its QEMUs, and whether the main job can run."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pageferry.events import Event
from pageferry.host.probes import Feature, check_features
from pageferry.host.probes.systems import ARENAS_MOVE, GUESTS_MOVE, SYSTEMS, SystemReport, choose, lacking
from pageferry.host.qemus import Qemu, QemuSearch


class Check(Event, frozen=True, tag="check"):
    """Everything that was found."""

    kernel: str
    """Release, for people: nothing is decided by it."""
    user: int
    """Effective user id."""
    features: list[Feature]
    systems: list[SystemReport]
    qemu: list[Qemu]
    main_job: bool
    """Whether arenas can be migrated while they are in use, and guests too if there is a QEMU."""
    reason: str | None
    """Why not, and what to do about it."""


def check() -> Check:
    """Try everything. Takes well under a second, and a few where something hangs; forks (see `check_features`)."""
    with QemuSearch() as search:
        features = check_features()
        qemus = search.results()
    reason = obstacle(features, any(qemu.usable for qemu in qemus))
    return Check(
        kernel=os.uname().release,
        user=os.geteuid(),
        features=list(features.values()),
        systems=[choose(system, features) for system in SYSTEMS],
        qemu=qemus,
        main_job=reason is None,
        reason=reason,
    )


def obstacle(features: Mapping[str, Feature], guests: bool) -> str | None:
    """What stands in the way of live migration, and what to do: of arenas, and with `guests` of QEMU guests too."""
    for needs, what in ((ARENAS_MOVE, "arenas and guests"), (GUESTS_MOVE, "QEMU guests") if guests else ((), "")):
        if missing := lacking(needs, features):
            first = features[missing[0]]
            return f"live migration of {what} needs {', '.join(missing)}: {first.detail}; {first.remedy}"
    return None
