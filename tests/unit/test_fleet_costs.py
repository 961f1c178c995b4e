"""Tests of the cost model, against results of the benchmarks and against sums of rounds."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

import pytest

from benchmarks.harness.machine import RESULTS
from pageferry.fleet import costs
from pageferry.fleet.costs import Costs, Load
from pageferry.fleet.model import Mode

GBIT = 125_000_000
MODEL = Costs()


def runs(name: str, part: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["runs"][part]
    return found


def test_defaults_are_within_the_recorded_ranges() -> None:
    guests = [run for run in runs("migrate", "guests") if "pageferry 10.0" in str(run["line"])]
    assert min(run["elapsed-ms"] for run in guests) <= MODEL.setup * 1000 <= max(run["elapsed-ms"] for run in guests)
    assert (
        min(run["downtime-ms"] for run in guests) <= MODEL.downtime * 1000 <= max(run["downtime-ms"] for run in guests)
    )
    tls = [run for run in runs("links", "loopback") if (run["link"], run["streams"]) == ("TLS", 2)]
    assert pytest.approx(median(run["first-round-mbps"] for run in tls) * 125_000, rel=0.01) == MODEL.rate
    plain = [run for run in runs("links", "loopback") if run["link"] == "plain"]
    assert pytest.approx(median(run["transferred"] for run in plain) / (1 << 30), rel=0.01) == MODEL.overhead


@pytest.mark.parametrize(("mode", "tolerance"), [("postcopy", 0.1), ("hybrid", 0.1)])
def test_predictions_of_post_copy_and_hybrid_agree_with_recorded_moves(mode: Mode, tolerance: float) -> None:
    measured = [run for run in runs("postcopy", "ledger") if run["mode"] == mode]
    seconds = median(run["total-ms"] for run in measured) / 1000
    sent = median(run["transferred"] for run in measured)
    rate = 256 * (1 << 20) / 4.0  # docs/benchmarks.md: its memory is sent once in 4 s
    load = Load(256 << 20, 128 << 20, mode)
    found = costs.predict(load, rate, Costs(setup=0.0))
    assert found.seconds == pytest.approx(seconds, rel=tolerance)
    assert found.bytes == pytest.approx(sent, rel=tolerance)


@pytest.mark.parametrize("dirty", [0, 1 << 20, 20 << 20, 60 << 20])
@pytest.mark.parametrize("volume", [10 << 20, 500 << 20, 8 << 30])
def test_pre_copy_sends_the_sum_of_its_rounds(volume: int, dirty: int) -> None:
    left, total, rounds = float(volume), 0.0, 0
    while True:
        total += left
        rounds += 1
        left = min(dirty * left / GBIT, volume)
        if left <= GBIT * MODEL.max_downtime:
            break
    found = costs.predict(Load(volume, dirty, "precopy"), GBIT, MODEL)
    assert found.bytes == pytest.approx((total + left) * MODEL.overhead, rel=0.01)
    assert found.downtime <= MODEL.downtime + MODEL.max_downtime + 1e-9
    assert found.seconds == pytest.approx(MODEL.setup + MODEL.downtime + found.bytes / GBIT)


def test_throttled_moves_end_although_the_workload_writes_faster_than_the_link() -> None:
    found = costs.predict(Load(1 << 30, 4 * GBIT, "precopy", auto_converge=True), GBIT, MODEL)
    assert (1 << 30) * 2 < found.bytes < (1 << 30) * 6


def test_rate_of_the_transfer_makes_up_for_the_set_up() -> None:
    rate = costs.rate_for(1 << 30, GBIT / 2, GBIT, MODEL)
    assert (1 << 30) / rate + MODEL.setup + MODEL.downtime == pytest.approx((1 << 30) / (GBIT / 2))
    assert costs.rate_for(1 << 20, GBIT / 2, GBIT, MODEL) == GBIT


@pytest.mark.parametrize("dirty", [None, 0, 1 << 20])
def test_moves_that_converge_are_not_expected_to_be_throttled(dirty: int | None) -> None:
    plain = costs.predict(Load(1 << 30, dirty, "precopy"), GBIT, MODEL)
    assert costs.predict(Load(1 << 30, dirty, "precopy", auto_converge=True), GBIT, MODEL) == plain
