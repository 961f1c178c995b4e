"""Checks of a host: features and systems of this host, its QEMU binaries, and whether migration can run."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pageferry.host.events import Check
from pageferry.host.probes import Feature, check_features
from pageferry.host.probes.systems import ARENAS_MOVE, GUESTS_MOVE, SYSTEMS, choose, lacking
from pageferry.host.qemus import QemuSearch


def check() -> Check:
    """Run all probes, and return the results. The call takes less than a second, or a few seconds if a probe blocks.

    The restrictions of `check_features` on threads apply.
    """
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
    """Return the reason why arenas (and guests, if `guests` is true) cannot be migrated, and a remedy; None if they
    can."""
    for needs, what in ((ARENAS_MOVE, "arenas and guests"), (GUESTS_MOVE, "QEMU guests") if guests else ((), "")):
        if missing := lacking(needs, features):
            first = features[missing[0]]
            return f"live migration of {what} requires {', '.join(missing)}: {first.detail}; {first.remedy}"
    return None
