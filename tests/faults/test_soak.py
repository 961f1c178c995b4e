"""Short soak: a few random migrations of a ledger and a guest between three hosts, with random faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.network import hosts
from tests.network.soak import Soak
from tests.network.travellers import guest_parts

SEED = 11
STEPS = 3


@pytest.mark.faults
def test_short_soak_has_one_owner_after_each_step(tmp_path: Path) -> None:
    hosts.require()
    with Soak(tmp_path, SEED, guest_parts()) as soak:
        for step in range(STEPS):
            soak.step(step)
        soak.finish()
