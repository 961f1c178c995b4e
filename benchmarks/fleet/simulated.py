"""Simulated evacuations of a rack and of a row, and the cost of their plans."""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.fleet import fleets
from benchmarks.fleet.fleets import Shape
from benchmarks.fleet.naive import FirstFit
from benchmarks.fleet.world import Outcome, World
from benchmarks.harness.bench import Setting
from pageferry.fleet import planning
from pageferry.fleet.execution import Execution
from pageferry.fleet.model import Plan, View

ROW = {"row": "row-1"}
RACK = {"row": "row-1", "rack": "rack-1-0"}
AREAS = {"rack": RACK, "row": ROW}
DEADLINES = (None, 120.0)
AWAY = 20.0
"""Time for which a host of a failure is unreachable, seconds."""


def plans(setting: Setting) -> list[dict[str, Any]]:
    """Measure the CPU time and the memory of each plan."""
    view = fleets.build(shape_of(setting))
    found = []
    for _ in range(setting.repetitions):
        for area in AREAS:
            hosts = hosts_of(view, area)
            plan, cost = _measured(view, hosts)
            found.append({"plan": f"evacuate a {area}", "hosts": len(hosts)} | cost | _figures(plan))
        began = time.process_time()
        plan = planning.rebalance(view)
        found.append(
            {"plan": "rebalance", "hosts": len(view.hosts), "cpu-s": time.process_time() - began} | _figures(plan)
        )
    return found


def evacuations(setting: Setting) -> list[dict[str, Any]]:
    """Simulate the evacuation of a rack and of a row, without and with failures, and by first-fit."""
    view = fleets.build(shape_of(setting))
    found = []
    for area in AREAS:
        hosts = hosts_of(view, area)
        plan = planning.evacuate(view, hosts)
        for method in ("planner", "planner, failures", "first-fit"):
            began = time.process_time()
            figures = _naive(view, hosts) if method == "first-fit" else _planned(view, plan, "failures" in method)
            figures["simulation-cpu-s"] = time.process_time() - began
            found.append({"area": area, "method": method, "bound-s": plan.lower_bound} | figures)
    return found


def shape_of(setting: Setting) -> Shape:
    """Return the size of the fleet."""
    return fleets.SMALL if setting.quick else fleets.LARGE


def hosts_of(view: View, area: str) -> frozenset[str]:
    """Return the names of the hosts of a rack or of a row."""
    wanted = AREAS[area].items()
    return frozenset(host.name for host in view.hosts if wanted <= host.labels.items())


def _measured(view: View, hosts: frozenset[str]) -> tuple[Plan, dict[str, float]]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident memory
    began = time.process_time()
    plan = planning.evacuate(view, hosts)
    return plan, {"cpu-s": time.process_time() - began, "memory": _peak()}


def _peak() -> int:
    """Return the peak of the resident memory of this process, with the view, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _figures(plan: Plan) -> dict[str, Any]:
    return {
        "workloads": len(plan.moves) + len(plan.unplaced),
        "unplaced": len(plan.unplaced),
        "makespan-s": plan.makespan,
        "bound-s": plan.lower_bound,
        "of-bound": plan.makespan / plan.lower_bound if plan.lower_bound else 1.0,
        "bytes": plan.bytes,
    }


def _planned(view: View, plan: Plan, failures: bool) -> dict[str, Any]:
    execution = Timed(Execution(view, plan))
    world = World(view, execution)
    if failures:
        inject(world, plan)
    outcome = world.run(lambda: execution.execution.finished)
    states = [task.state for task in execution.execution.tasks.values()]
    check_owners(world, execution.execution)
    return _results(world, outcome) | {
        "plan-s": plan.makespan,
        "control-cpu-s": execution.cpu,
        "stayed": states.count("given-up") + len(plan.unplaced),
        "stuck": states.count("stuck"),
    }


def _naive(view: View, hosts: frozenset[str]) -> dict[str, Any]:
    controller = FirstFit(view, hosts)
    world = World(view, controller)
    outcome = world.run(lambda: controller.finished)
    return _results(world, outcome) | {"stayed": controller.given_up + controller.unplaced, "stuck": 0}


def _results(world: World, outcome: Outcome) -> dict[str, Any]:
    downtimes = sorted(outcome.downtimes)
    busy = world.flows.peak[:-1] / world.flows.links[:-1]
    shared = [number for number in range(len(busy)) if world.network.is_shared(number)]
    return {
        "seconds": outcome.seconds,
        "moved": outcome.moved,
        "starts": outcome.starts,
        "failed-starts": outcome.failed,
        "bytes": world.flows.carried,
        "peak-host": float(busy.max()),
        "peak-uplink": float(busy[shared].max()),
        "downtime-p50-ms": downtimes[len(downtimes) // 2] * 1000,
        "downtime-p99-ms": downtimes[int(len(downtimes) * 0.99)] * 1000,
        "downtime-longest-ms": downtimes[-1] * 1000,
    }


class Timed:
    """Execution whose CPU time is measured."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.cpu = 0.0

    @property
    def wake_at(self) -> float | None:
        """Time of the next `Ticked`."""
        return self.execution.wake_at

    def start(self, now: float) -> list[Any]:
        """Start the execution."""
        began = time.process_time()
        actions = self.execution.start(now)
        self.cpu += time.process_time() - began
        return list(actions)

    def handle(self, event: Any, now: float) -> list[Any]:
        """Pass an event."""
        began = time.process_time()
        actions = self.execution.handle(event, now)
        self.cpu += time.process_time() - began
        return list(actions)


def inject(world: World, plan: Plan) -> None:
    """Let failures happen during a plan: a hundredth of the moves fail, a fiftieth of the destinations are full, hosts
    are cut off for 20 s, among them sources, and the head restarts."""
    chance = random.Random(7)
    sources = sorted({move.source for move in plan.moves})
    destinations = sorted({move.destination for move in plan.moves})
    world.full |= set(chance.sample(destinations, max(1, len(destinations) // 50)))
    away = chance.sample(sources, max(1, len(sources) // 40)) + chance.sample(
        destinations, max(1, len(destinations) // 40)
    )
    for host in away:
        begin = chance.uniform(0.05, 0.9) * plan.makespan
        world.at(begin, lambda host=host: world.lose(host))  # type: ignore[misc]
        world.at(begin + AWAY, lambda host=host: world.find(host))  # type: ignore[misc]
    for _ in range(max(1, len(plan.moves) // 100)):
        world.at(chance.uniform(0.0, plan.makespan), lambda: _fail_one(world, chance))
    world.at(plan.makespan / 2, world.restart_head)


def _fail_one(world: World, chance: random.Random) -> None:
    moving = [live for live in world.lives.values() if live.conducted]
    if moving:
        world.fail(chance.choice(moving), "connection-lost")


def check_owners(world: World, execution: Execution) -> None:
    """Raise RuntimeError if the execution knows another owner than the hosts."""
    for name, owner in execution.owners.items():
        if owner is not None and world.owner[name] != owner:
            raise RuntimeError(f"{name} is on {world.owner[name]}, not on {owner}")
