"""Tests of the execution of plans under random failures, against a model of the hosts (`tests.fleet_world`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from pageferry.fleet import planning, steps
from pageferry.fleet.admission import Grant
from pageferry.fleet.execution import Execution
from pageferry.fleet.model import Limits
from pageferry.fleet.tasks import Task
from tests.fleet_world import World, small_view

NUMBERS = st.integers(0, 30)
CAUSES = st.sampled_from(["connection-lost", "refused", "full", "not-converging", "unsupported", "other"])


class Failures(RuleBasedStateMachine):
    """Random order of messages, phases and failures. At the end, everything is repaired, and the plan must end."""

    world: World

    kind: type[Execution] = Execution

    @initialize(
        hosts=st.integers(3, 5),
        workloads=st.integers(1, 8),
        memory=st.sampled_from([16, 24, 64]),
        attempts=st.integers(1, 3),
    )
    def begin(self, hosts: int, workloads: int, memory: int, attempts: int) -> None:
        """`memory`: that of the destinations, MiB."""
        view = small_view(hosts, workloads, memory)
        plan = planning.evacuate(view, ["h0"], limits=Limits(attempts=attempts))
        self.world = World(view, plan, self.kind(view, plan))

    @precondition(lambda self: self.world.news)
    @rule(number=NUMBERS)
    def deliver(self, number: int) -> None:
        self.world.deliver(number)

    @precondition(lambda self: self.world.news)
    @rule(number=NUMBERS)
    def deliver_twice(self, number: int) -> None:
        news = self.world.news
        news.append(news[number % len(news)])
        self.world.deliver(number)

    @precondition(lambda self: self.world.news)
    @rule(number=NUMBERS)
    def lose_an_event(self, number: int) -> None:
        self.world.news.pop(number % len(self.world.news))

    @precondition(lambda self: self.world.orders)
    @rule(number=NUMBERS)
    def perform(self, number: int) -> None:
        self.world.perform(number)

    @precondition(lambda self: self.world.orders)
    @rule(number=NUMBERS)
    def perform_all(self, number: int) -> None:
        while self.world.orders:
            self.world.perform(number)

    @precondition(lambda self: self.world.orders)
    @rule(number=NUMBERS)
    def lose_an_order(self, number: int) -> None:
        self.world.orders.pop(number % len(self.world.orders))

    @precondition(lambda self: self.world.lives)
    @rule(number=NUMBERS, steps=st.integers(1, 3))
    def advance(self, number: int, steps: int) -> None:
        name = sorted(self.world.lives)[number % len(self.world.lives)]
        for _ in range(steps):
            if name in self.world.lives:
                self.world.advance(name)

    @precondition(lambda self: self.world.lives)
    @rule(number=NUMBERS, cause=CAUSES)
    def fail(self, number: int, cause: steps.Cause) -> None:
        self.world.fail(sorted(self.world.lives)[number % len(self.world.lives)], cause)

    @rule(number=NUMBERS, orphans=st.booleans())
    def kill_agent(self, number: int, orphans: bool) -> None:
        self.world.kill_agent(f"h{number % len(self.world.hosts)}", orphans=orphans)

    @rule(number=NUMBERS)
    def lose_host(self, number: int) -> None:
        host = f"h{number % len(self.world.hosts)}"
        self.world.lose_host(host)
        self.world.news.append(steps.HostLost(host=host))

    @precondition(lambda self: self.world.down)
    @rule(number=NUMBERS)
    def start_agent(self, number: int) -> None:
        self.world.start_agent(sorted(self.world.down)[number % len(self.world.down)])

    @rule(number=NUMBERS)
    def report(self, number: int) -> None:
        host = f"h{number % len(self.world.hosts)}"
        if host not in self.world.down:
            self.world.news.append(self.world.report(host))

    @rule(number=NUMBERS)
    def fill(self, number: int) -> None:
        self.world.full.add(f"h{number % len(self.world.hosts)}")

    @rule()
    def restart_head(self) -> None:
        self.world.restart_head()

    @rule(number=st.integers(0, 200))
    def end_workload(self, number: int) -> None:
        if number < len(self.world.execution.tasks):
            self.world.end_workload(f"w{number}")

    @rule(seconds=st.sampled_from([0.5, 3.0, 10.0, 70.0]))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule(chance=st.integers(0, 20))
    def cancel(self, chance: int) -> None:
        if not chance:
            self.world.tell(steps.CancelRequested())

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestFailures = Failures.TestCase
TestFailures.settings = SETTINGS


# -- incorrect executions, which the model must detect


class BelievesThatUnknownMovesWereAborted(Execution):
    def _doubt(self, task: Task) -> None:
        self._aborted(task, "connection-lost", "")


class RecoversWithoutAQuestion(Execution):
    def _on_recovered(self, event: steps.Recovered) -> None:
        super()._on_recovered(replace(event, owner="source") if event.owner == "unknown" else event)

    _handlers: ClassVar[Mapping[type[steps.StepEvent], Callable[..., None]]] = {
        **Execution._handlers,
        steps.Recovered: _on_recovered,
    }


class BelievesOldEvents(Execution):
    def _current(self, name: str, attempt: int) -> Task | None:
        return self.tasks[name] if self.tasks[name].state in ("moving", "asking", "recovering") else None


class FreesMemoryAtTheStart(Execution):
    def _start(self, grant: Grant) -> None:
        super()._start(grant)
        task = self.tasks[grant.request.move.workload]
        self._capacity.remove(task.workload, task.move.destination)


class ForgetsStuckMoves(Execution):
    def _stick(self, task: Task, reason: str, remedy: str) -> None:
        super()._stick(task, reason, remedy)
        task.owner = task.move.source


@pytest.mark.parametrize(
    "kind",
    [
        BelievesThatUnknownMovesWereAborted,
        RecoversWithoutAQuestion,
        pytest.param(BelievesOldEvents, marks=pytest.mark.only_full),
        pytest.param(FreesMemoryAtTheStart, marks=pytest.mark.only_full),
        ForgetsStuckMoves,
    ],
)
def test_incorrect_executions_are_detected(kind: type[Execution]) -> None:
    machine = type("Machine", (Failures,), {"kind": kind})
    quick = settings(SETTINGS, max_examples=5000, phases=[Phase.generate], derandomize=True, database=None)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=quick)
