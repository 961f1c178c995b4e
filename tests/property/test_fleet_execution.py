"""Tests of the execution of plans under random failures, against a model of the hosts (`tests.fleet_world`)."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pageferry.fleet import planning, steps
from pageferry.fleet.model import Limits
from tests.fleet_world import World, small_view

NUMBERS = st.integers(0, 30)
CAUSES = st.sampled_from(["connection-lost", "refused", "full", "not-converging", "unsupported", "other"])


class Failures(RuleBasedStateMachine):
    """Random order of messages, phases and failures. At the end, everything is repaired, and the plan must end."""

    world: World

    @initialize(
        hosts=st.integers(2, 5),
        workloads=st.integers(1, 8),
        memory=st.sampled_from([16, 24, 64]),
        attempts=st.integers(1, 3),
    )
    def begin(self, hosts: int, workloads: int, memory: int, attempts: int) -> None:
        view = small_view(max(hosts, 3), workloads, max(memory, 48))
        view = type(view)(
            hosts=tuple(
                type(host)(**{**{name: getattr(host, name) for name in host.__struct_fields__}, "memory": memory << 20})
                if host.name != "h0"
                else host
                for host in view.hosts
            ),
            workloads=view.workloads,
        )
        plan = planning.evacuate(view, ["h0"], limits=Limits(attempts=attempts))
        self.world = World(view, plan)

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


TestFailures = Failures.TestCase
TestFailures.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
