"""Tests of the simulation of fleets: fair shares of links, and moves with and without failures."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fleet import fleets, simulated, tables
from benchmarks.fleet.flows import Flows
from benchmarks.harness.bench import Setting
from benchmarks.harness.tables import Target
from pageferry.fleet import planning


def test_transfers_share_a_link_and_use_what_others_leave() -> None:
    flows = Flows([10.0, 4.0])
    flows.add("a", [0], 100.0, 100.0)
    flows.add("b", [0, 1], 100.0, 100.0)
    flows.add("c", [0], 1.0, 100.0)
    assert (flows.rate_of("a"), flows.rate_of("b"), flows.rate_of("c")) == (5.0, 4.0, 1.0)
    assert flows.next_end() == 20.0
    assert flows.advance(20.0) == ["a"]
    flows.remove("a")
    assert flows.rate_of("b") == 4.0


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 30), links=st.integers(1, 6), count=st.integers(1, 30))
def test_shares_are_fair(seed: int, links: int, count: int) -> None:
    chance = random.Random(seed)
    rates = [chance.uniform(1.0, 10.0) for _ in range(links)]
    paths = [chance.sample(range(links), chance.randint(1, links)) for _ in range(count)]
    limits = [chance.choice((0.3, 1.0, 100.0)) for _ in range(count)]
    flows = Flows(rates)
    for number in range(count):
        flows.add(str(number), paths[number], limits[number], 1.0)
    found = [flows.rate_of(str(number)) for number in range(count)]
    loads = [sum(found[number] for number in range(count) if link in paths[number]) for link in range(links)]
    for load, rate in zip(loads, rates, strict=True):
        assert load <= rate * (1 + 1e-6)
    for number in range(count):
        # A transfer below its limit has a full link on which no other transfer is faster.
        limited = found[number] >= limits[number] * (1 - 1e-6)
        bottlenecks = [
            link
            for link in paths[number]
            if loads[link] >= rates[link] * (1 - 1e-6)
            and all(found[other] <= found[number] * (1 + 1e-6) for other in range(count) if link in paths[other])
        ]
        assert limited or bottlenecks


@pytest.mark.parametrize("failures", [False, True])
def test_simulated_evacuation_ends_as_the_plan_states(failures: bool) -> None:
    view = fleets.build(fleets.SMALL)
    hosts = simulated.hosts_of(view, "row")
    plan = planning.evacuate(view, hosts)
    figures = simulated._planned(view, plan, failures)
    assert (figures["moved"], figures["stuck"]) == (len(plan.moves), 0)
    assert figures["starts"] >= len(plan.moves) + failures
    if not failures:
        assert figures["seconds"] == pytest.approx(plan.makespan, rel=0.1)
        assert figures["bytes"] == pytest.approx(plan.bytes, rel=0.05)


def test_first_fit_sends_more_and_takes_longer() -> None:
    view = fleets.build(fleets.SMALL)
    hosts = simulated.hosts_of(view, "row")
    plan = planning.evacuate(view, hosts)
    ours, naive = simulated._planned(view, plan, False), simulated._naive(view, hosts)
    assert naive["bytes"] > 2 * ours["bytes"]
    assert naive["seconds"] > 2 * ours["seconds"]


def test_benchmark_reports_all_plans_and_methods(tmp_path: Path) -> None:
    setting = Setting(tmp_path, 1, quick=True)
    results = {"plans": simulated.plans(setting), "evacuations": simulated.evacuations(setting)}
    text = "\n".join(tables.render(results))
    for line in ("| evacuate a rack |", "| rebalance |", "| row | planner, failures |", "| rack | first-fit |"):
        assert line in text
    assert all(isinstance(target, Target) for target in tables.judge(results))
