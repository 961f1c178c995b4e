"""Result of `pageferry check`: features and systems of this host, its QEMU binaries, and whether migration can run."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pageferry.events import Event
from pageferry.host.probes import Feature, check_features
from pageferry.host.probes.systems import ARENAS_MOVE, GUESTS_MOVE, SYSTEMS, SystemReport, choose, lacking
from pageferry.host.qemus import Qemu, QemuSearch


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
    """Whether live migration can run: of arenas, and of guests too if there is a QEMU."""
    reason: str | None
    """Reason why live migration cannot run, with a remedy; None if it can."""


def check() -> Check:
    """Run all probes. Takes less than a second, or a few seconds if a probe blocks; forks (see `check_features`)."""
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
    """Return the reason why arenas, or with `guests` guests, cannot be migrated, and a remedy; None if they can."""
    for needs, what in ((ARENAS_MOVE, "arenas and guests"), (GUESTS_MOVE, "QEMU guests") if guests else ((), "")):
        if missing := lacking(needs, features):
            first = features[missing[0]]
            return f"live migration of {what} requires {', '.join(missing)}: {first.detail}; {first.remedy}"
    return None
