"""Accounting: phases sum up to the total, and rounds of a migration to the transferred bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import Program

pytestmark = pytest.mark.usefixtures("root")


@pytest.mark.parametrize("words", [["--mode", "precopy"], ["--mode", "hybrid"], ["--mode", "postcopy"]], ids=" ".join)
@pytest.mark.parametrize("more", [[], ["--bandwidth", "64M", "--codec", "lz4"]], ids=" ".join)
def test_migration_phases_and_rounds_sum_to_totals(words: list[str], more: list[str]) -> None:
    with moving.receiver("there") as there:
        address = moving.address_of(there)
        with (
            moving.ledger("here", size=64 * MIB, options={"rate": 8 * MIB}) as here,
            moving.migrating("here", address, *words, *more) as migration,
        ):
            lines = [json.loads(line) for line in _lines(migration)]
            assert migration.wait() == 0
            moving.ends_intact(here, "moved")
    result = lines[-1]
    phases = result["phases"]
    assert sum(phases.values()) == pytest.approx(result["total-time"], rel=0.01)
    pause = [phases[name] for name in ("stop", "last-pages", "load", "hand-over")]
    assert sum(pause) == pytest.approx(result["downtime"], rel=0.01)
    rounds = [line for line in lines if line["type"] == "round"]
    if words[1] == "precopy":
        assert sum(line["sent"] for line in rounds) == result["transferred"]
        pages = sum(line["pages"] for line in rounds)
        assert pages == result["normal"] + result["duplicate"] + result["skipped"]
        assert any(line["switch-over"] for line in rounds)
    numbers = [line["round"] for line in rounds]
    assert numbers == sorted(set(numbers))


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


def _lines(program: Any) -> list[str]:
    found: list[str] = []
    while not found or json.loads(found[-1])["type"] != "migration":
        found.append(program.line())
    return found
