"""Tests of the statistics: phases add up to the total time, and rounds of a migration add up to the sent bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import accounting
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import Program

pytestmark = pytest.mark.usefixtures("root")


MODES = ["precopy", "hybrid", "postcopy", "hybrid --max-downtime 0 --max-rounds 2"]
LINKS = ["", "--bandwidth 64M --codec lz4", "--streams 3 --populate hot"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("link", LINKS)
def test_migration_phases_and_rounds_sum_to_totals(mode: str, link: str) -> None:
    with moving.receiver("there") as there:
        address = moving.address_of(there)
        with (
            moving.ledger("here", size=64 * MIB, options={"rate": 8 * MIB}) as here,
            moving.migrating("here", address, "--mode", *mode.split(), *link.split()) as migration,
        ):
            lines = moving.all_until(migration, "migration")
            assert migration.wait() == 0
            moving.ends_intact(here, "moved")
        accounting.check_source(lines)
        accounting.check_receiver(moving.until(there, "received"))
        moving.is_intact(there)


@pytest.mark.parametrize("mode", ["lazy", "stop"])
def test_checkpoint_phases_sum_to_total(mode: str, tmp_path: Path) -> None:
    with moving.ledger("saved", size=64 * MIB, options={"rate": 8 * MIB}):
        for words in ([], ["--parent", str(tmp_path / "first")]):
            name = "next" if words else "first"
            result = _checkpoint("saved", str(tmp_path / name), "--mode", mode, *words)
            phases = result["phases"]
            assert sum(phases.values()) == pytest.approx(result["total-time"], rel=0.01)
            outside = ("set-up", "publish") if mode == "stop" else ("set-up", "arm", "save", "publish")
            pause = sum(time for phase, time in phases.items() if phase not in outside)
            assert pause == pytest.approx(result["downtime"], rel=0.01)


def _checkpoint(*words: str) -> Any:
    with Program("-m", "pageferry", "checkpoint", *words, "--output", "json") as saving:
        result = moving.until(saving, "checkpoint")
        assert saving.wait() == 0
    return result
