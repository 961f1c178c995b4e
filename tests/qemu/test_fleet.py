"""Tests of fleets on a real Ray cluster, whose nodes are network namespaces, with ledgers and guests as workloads.

All tests share one cluster. Ledgers verify every write of theirs, and the payload verifies the memory of a guest.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pageferry.host import proc
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import Program, wait_until
from tests.network import hosts
from tests.network.fleet import Fleet

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("root"), pytest.mark.timeout(300)]

RATE = "24M"
"""Rate of the links that the plans use, bytes per second, so that a move of a large ledger takes seconds."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    pytest.importorskip("ray")
    hosts.require()
    with Fleet(tmp_path_factory.mktemp("fleet"), link=RATE, timeout="3s") as made:
        yield made


@pytest.fixture
def ledgers(fleet: Fleet) -> Iterator[Ledgers]:
    with Ledgers(fleet) as started:
        yield started


class Ledgers:
    """Ledgers of a fleet. At the end, each of them must run on exactly one host, and have lost no write."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._stack = ExitStack()
        self._names: list[str] = []

    def start(self, name: str, on: str = "a", mib: int = 16) -> None:
        """Start a ledger on a host."""
        setup = {"name": name, "size": mib * MIB, "options": {"threads": 1, "rate": MIB}}
        program = self._fleet.hosts[on].program("-m", "pageferry.demo.process", json.dumps(setup))
        self._stack.enter_context(program)
        assert program.json()["type"] == "ready"
        self._names.append(name)

    def __enter__(self) -> Ledgers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                for name in self._names:
                    self._end(name)
        finally:
            self._stack.close()

    def _end(self, name: str) -> None:
        (owner,) = owners(self._fleet, name)
        host = self._fleet.hosts[owner]
        moving.runs(name, host)
        entry = host.registry.lookup(name)
        os.kill(entry.pid, signal.SIGTERM)
        found = ends(self._fleet, owner, name)
        assert found is None or found["intact"], found


def owners(fleet: Fleet, name: str) -> list[str]:
    """Return the hosts that run the workload, after a source has removed its remains."""
    wait_until(lambda: len(fleet.owners(name)) == 1, f"one owner of {name}: {fleet.owners(name)}")
    return fleet.owners(name)


def ends(fleet: Fleet, owner: str, name: str) -> dict[str, Any] | None:
    """Wait for the end of a ledger that an agent has received, and return its report; None if it was never moved."""
    outputs = list((fleet.hosts[owner].registry.path / ".fleet").glob("*-in/stdout"))
    reports: list[dict[str, Any]] = []

    def ended() -> bool:
        reports.extend(
            event
            for path in outputs
            for event in map(json.loads, path.read_text().splitlines())
            if event["type"] == "ledger" and event["workload"] == name
        )
        return bool(reports) or name not in fleet.hosts[owner].registry.entries()

    wait_until(ended, f"the end of {name}")
    return reports[-1] if reports else None


def phase(move: Program, wanted: str) -> dict[str, Any]:
    """Wait until a command reports a phase of a move."""
    while True:
        event = move.json()
        if event["type"] == "fleet-move-event" and event["phase"] == wanted:
            return dict(event)


def result(move: Program) -> dict[str, Any]:
    """Return the result of a command."""
    return moving.until(move, "fleet-result")


def process_of(fleet: Fleet, host: str, verb: str, name: str) -> int:
    """Return the pid of the command of an operation of a host."""
    mark = f"PAGEFERRY_RUN_DIR={fleet.hosts[host].run_directory}".encode()

    def found() -> list[int]:
        pids = []
        for pid in proc.pids():
            try:
                words = proc.arguments(pid)
                if [verb, name] in (words[at : at + 2] for at in range(len(words))) and "-I" in words[:2]:
                    pids += [pid] if mark in Path(f"/proc/{pid}/environ").read_bytes() else []
            except Exception:  # it has exited
                continue
        return pids

    wait_until(found, f"{verb} of {name} on {host}")
    return found()[0]


def test_evacuation_moves_all_workloads_after_its_plan_was_printed(fleet: Fleet, ledgers: Ledgers) -> None:
    for name in ("one", "two"):
        ledgers.start(name)
    assert fleet.where() == {"one": "a", "two": "a"}
    plan, planned = fleet.run("evacuate", "a", "--dry-run")
    assert (plan["type"], planned["moves"]) == ("fleet-plan", [])
    assert {move["workload"] for move in plan["moves"]} == {"one", "two"}
    assert fleet.where() == {"one": "a", "two": "a"}
    events = fleet.run("evacuate", "a")
    assert events[0]["type"] == "fleet-plan"
    assert all(move["outcome"] == "done" and move["downtime"] > 0 for move in events[-1]["moves"])
    assert {one["destination"] for one in events[-1]["moves"]} == {"b", "c"}
    assert set(fleet.where().values()) == {"b", "c"}


def test_agents_killed_during_a_move_do_not_affect_it(fleet: Fleet, ledgers: Ledgers) -> None:
    ledgers.start("large", mib=32)
    with fleet.start("move", "large", "b") as move:
        phase(move, "moving")
        for name in ("a", "b"):
            fleet.kill_agent(name)
        found = result(move)
        assert move.wait() == 0
    assert [one["outcome"] for one in found["moves"]] == ["done"]
    assert fleet.where() == {"large": "b"}


def test_killed_driver_leaves_a_move_that_ends_by_itself(fleet: Fleet, ledgers: Ledgers) -> None:
    ledgers.start("large", mib=32)
    with fleet.start("move", "large", "c") as move:
        phase(move, "moving")
        move.kill()
    assert [one["workload"] for one in fleet.status()["operations"]] in (["large"], [])
    wait_until(lambda: fleet.owners("large") == ["c"], "the end of the move")
    assert fleet.where() == {"large": "c"}


def test_killed_migration_is_recovered_and_started_again(fleet: Fleet, ledgers: Ledgers) -> None:
    ledgers.start("large", mib=32)
    with fleet.start("move", "large", "b") as move:
        phase(move, "moving")
        os.kill(process_of(fleet, "a", "migrate", "large"), signal.SIGKILL)
        found = result(move)
        assert move.wait() == 0
    assert [(one["outcome"], one["attempts"]) for one in found["moves"]] == [("done", 2)]
    assert owners(fleet, "large") == [found["moves"][0]["destination"]]


@pytest.mark.only_full
def test_killed_receiver_leaves_the_workload_at_its_source(fleet: Fleet, ledgers: Ledgers) -> None:
    ledgers.start("large", mib=32)
    with fleet.start("move", "large", "b") as move:
        phase(move, "moving")
        os.kill(process_of(fleet, "b", "receive", "large"), signal.SIGKILL)
        aborted = phase(move, "aborted")
        assert aborted["reason"]
        assert result(move)["moves"][0]["outcome"] == "done"
        assert move.wait() == 0


@pytest.mark.only_full
def test_cancelled_move_leaves_the_workload_at_its_source(fleet: Fleet, ledgers: Ledgers) -> None:
    ledgers.start("large", mib=256)
    with fleet.start("move", "large", "b") as move:
        phase(move, "moving")
        assert fleet.run("cancel", "large")[-1]["workloads"] == ["large"]
        assert result(move)["moves"][0]["outcome"] == "aborted"
        assert move.wait() == 41
    assert owners(fleet, "large") == ["a"]


@pytest.mark.only_full
def test_host_that_joins_again_brings_its_workloads(fleet: Fleet, ledgers: Ledgers) -> None:
    ledgers.start("one", on="c")
    fleet.leave("c", signal.SIGKILL)
    wait_until(lambda: "c" not in [host["name"] for host in fleet.status()["hosts"]], "the end of the agent of c", 60)
    assert fleet.where() == {}
    fleet.join("c")
    assert fleet.where() == {"one": "c"}


@pytest.mark.only_full
def test_host_without_certificate_of_its_name_receives_nothing(fleet: Fleet, ledgers: Ledgers) -> None:
    ledgers.start("one")
    fleet.leave("b")
    fleet.trust["b"], right = fleet.trust["c"], fleet.trust["b"]
    try:
        fleet.join("b")
        with fleet.start("move", "one", "b") as move:
            assert "certificate" in phase(move, "aborted")["reason"]
            assert result(move)["moves"][0]["destination"] == "c"
        assert owners(fleet, "one") == ["c"]
    finally:
        fleet.leave("b")
        fleet.trust["b"] = right
        fleet.join("b")


def test_clones_are_spread_and_evacuated(fleet: Fleet, payload_on_tcg: GuestParts, tmp_path: Path) -> None:
    serials = tmp_path / "serials"
    serials.mkdir()
    command = payload_on_tcg.command(Serial(serials / "{name}-{host}"), memory="64M", checker="ferry.mib=16")
    try:
        fleet.run("run", "guest", "--host", "a", "--", *command)
        wait_until(lambda: Serial(serials / "guest-a").last is not None, "the first tick of the guest")
        fleet.run("checkpoint", str(fleet.images), "guest")
        started = fleet.run("clone", "guest.img", "--count", "3", "--spread", "--name", "clone-{n}", "--", *command)
        assert started[0]["type"] == "fleet-plan"
        assert {one["host"] for one in started[-1]["started"]} == {"a", "b", "c"}
        events = fleet.run("evacuate", "a")
        moved = {one["workload"]: one for one in events[-1]["moves"]}
        assert all(one["outcome"] == "done" for one in moved.values()), moved
        clones = [one for name, one in moved.items() if name.startswith("clone-")]
        assert [one["shares-base"] for one in clones] == [True]
        where = fleet.where()
        assert set(where) == {"guest", "clone-1", "clone-2", "clone-3"}
        assert set(where.values()) == {"b", "c"}
        for name, owner in where.items():
            asyncio.run(Serial(serials / f"{name}-{owner}").passes(1))
        assert [path.name for path in serials.iterdir() if Serial(path).bad] == []
    finally:
        for host in fleet.hosts.values():
            for name in host.registry.entries():
                words = ("-m", "pageferry", "stop", name)
                with host.program(*words, stderr=subprocess.DEVNULL) as stop:
                    stop.wait()


def movable(fleet: Fleet, calls: int, *places: str) -> dict[str, Any]:
    """Run the program with a movable actor, and return what it has found."""
    words = ("tests.network.movable_program", fleet.address, str(calls), str(fleet.trust["shared"]), *places)
    with fleet.hosts["a"].program("-m", *words, env=fleet.environment("a"), stderr=subprocess.DEVNULL) as program:
        found: dict[str, Any] = program.json()
    return found


def test_calls_of_a_moving_actor_are_executed_exactly_once(fleet: Fleet) -> None:
    found = movable(fleet, 4000, "a", "b", "c")
    assert found["wrong"] == []
    assert found["calls"] >= 4000
    assert found["total"] == [found["calls"]] * 2
    assert len(found["downtimes"]) == 2
    assert found["error"] == "'wanted'"
    assert found["lost"].startswith("cannot call total of log: ")


@pytest.mark.only_full
def test_actor_moves_away_from_a_node_that_ray_drains(fleet: Fleet) -> None:
    words = ("-m", "tests.network.movable_program", fleet.address, "0", str(fleet.trust["shared"]), "b")
    try:
        with fleet.hosts["a"].program(*words, env=fleet.environment("a"), stderr=subprocess.DEVNULL) as program:
            assert program.json() == fleet.hosts["b"].address
            fleet.drain("b")
            assert next(host["draining"] for host in fleet.status()["hosts"] if host["name"] == "b")

            def moved() -> bool:
                program.say("")
                return bool(program.json() != fleet.hosts["b"].address)

            wait_until(moved, "the move of the actor")
    finally:
        fleet.kill_ray()
        for name in fleet.names:
            fleet.start_ray(name)
        fleet.join(*fleet.names)


@pytest.mark.only_full
def test_move_goes_on_while_ray_is_killed_and_started_again(fleet: Fleet, ledgers: Ledgers) -> None:
    ledgers.start("large", mib=128)
    ledgers.start("small", on="c")
    with fleet.start("move", "large", "b") as move:
        phase(move, "moving")
        fleet.kill_ray()
        move.kill()
    assert fleet.owners("small") == ["c"]
    for name in fleet.names:
        fleet.start_ray(name)
    fleet.join(*fleet.names)
    assert owners(fleet, "large") == ["b"]
    assert fleet.where() == {"large": "b", "small": "c"}


@pytest.mark.only_full
def test_cluster_without_a_token_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    hosts.require()
    with Fleet(tmp_path / "fleet", ("a",), secure=False) as fleet:
        assert [host["name"] for host in fleet.status()["hosts"]] == ["a"]
        fleet.secure = True
        fleet.run("status", code=40, RAY_AUTH_MODE="disabled", RAY_USE_TLS="0")
        assert "it accepts clients without a token and its connections are not encrypted" in fleet.said
