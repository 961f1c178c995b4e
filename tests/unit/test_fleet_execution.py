"""Tests of the execution of plans: each failure in each phase of a move, and what follows."""

from __future__ import annotations

import pytest

from pageferry.fleet import planning, steps
from pageferry.fleet.execution import Execution
from pageferry.fleet.model import Host, Limits, View, Workload
from pageferry.fleet.tasks import Task
from tests.fleet_world import World

MIB = 1 << 20
PHASES = {"before the start": 0, "copying": 1, "handed over": 2, "decided": 3, "ended": 4}
"""Number of steps of a move."""


def world(
    hosts: int = 3, *, memory: int = 64, limits: Limits | None = None, cannot: dict[str, str] | None = None
) -> World:
    """Return a fleet whose host `a` is evacuated: one workload, `web`."""
    every = tuple(Host(name=name, memory=memory * MIB, link=MIB) for name in "abcdef"[:hosts])
    web = Workload(name="web", host="a", memory=8 * MIB, private=8 * MIB, dirty_rate=1000, cannot=cannot or {})
    view = View(hosts=every, workloads=(web,))
    return World(view, planning.evacuate(view, ["a"], limits=limits or Limits()))


def task(fleet: World) -> Task:
    return fleet.execution.tasks["web"]


def reach(fleet: World, phase: str) -> None:
    """Let the move run up to a phase."""
    for number in range(PHASES[phase]):
        if number == 0:
            perform(fleet)
        else:
            fleet.advance("web")


def perform(fleet: World) -> None:
    while fleet.orders:
        fleet.perform(0)


def deliver(fleet: World) -> None:
    while fleet.news:
        fleet.deliver(0)


def started(fleet: World) -> list[steps.StartMove]:
    return [order for order in fleet.orders if isinstance(order, steps.StartMove)]


def test_a_move_without_failures_is_started_once_and_ends_at_the_destination() -> None:
    fleet = world()
    destination = task(fleet).move.destination
    reach(fleet, "ended")
    deliver(fleet)
    assert (task(fleet).state, task(fleet).owner, task(fleet).attempt) == ("done", destination, 1)
    assert fleet.execution.finished
    assert fleet.execution.wake_at is None


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("orphans", [False, True])
def test_an_agent_that_is_killed_in_any_phase_is_asked_before_the_workload_is_moved_again(
    phase: str, orphans: bool
) -> None:
    fleet = world()
    reach(fleet, phase)
    fleet.news.clear()
    fleet.kill_agent("a", orphans=orphans)
    fleet.tell(steps.HostLost(host="a"))
    assert task(fleet).owner is None
    assert steps.AskHost(host="a") in fleet.orders
    fleet.settle()
    assert task(fleet).state == "done"


@pytest.mark.parametrize("phase", PHASES)
def test_a_source_that_stays_unreachable_leaves_an_instruction(phase: str) -> None:
    fleet = world()
    reach(fleet, phase)
    fleet.news.clear()
    fleet.lose_host("a")
    fleet.tell(steps.HostLost(host="a"))
    while not fleet.execution.finished:
        perform(fleet)
        deliver(fleet)
        fleet.tick(5.0)
    assert task(fleet).state == "stuck"
    assert task(fleet).owner is None
    assert "start a with the agent" in fleet.instructions["web"].remedy
    assert "--recover` on a" in fleet.instructions["web"].remedy


def test_a_stuck_workload_keeps_counting_on_both_hosts() -> None:
    fleet = world(hosts=2, memory=12)
    reach(fleet, "handed over")
    fleet.lose_host("a")
    fleet.tell(steps.HostLost(host="a"))
    fleet.tick(200.0)
    rooms = fleet.execution._capacity.rooms
    assert task(fleet).state == "stuck"
    assert (rooms["a"].free, rooms["b"].free) == (4 * MIB, 4 * MIB)


@pytest.mark.parametrize("phase", ["handed over", "decided"])
def test_a_stuck_workload_is_resolved_when_its_source_replies_again(phase: str) -> None:
    fleet = world()
    reach(fleet, phase)
    fleet.lose_host("a")
    fleet.tell(steps.HostLost(host="a"))
    fleet.tick(200.0)
    assert task(fleet).state == "stuck"
    fleet.settle()
    assert (task(fleet).state, task(fleet).owner) == ("done", fleet.owner["web"])
    assert task(fleet).attempt == (1 if phase == "decided" else 2)


@pytest.mark.parametrize("phase", PHASES)
def test_a_restart_of_the_head_in_any_phase_is_resolved_by_the_hosts(phase: str) -> None:
    fleet = world()
    reach(fleet, phase)
    fleet.restart_head()
    assert task(fleet).owner is None
    if PHASES[phase]:
        assert fleet.orders == [steps.AskHost(host="a")]
    fleet.settle()
    assert (task(fleet).state, task(fleet).owner) == ("done", fleet.owner["web"])
    assert task(fleet).attempt == 1


def test_a_move_that_survives_a_restart_of_the_head_is_not_recovered_while_it_runs() -> None:
    fleet = world()
    reach(fleet, "copying")
    fleet.restart_head()
    for _ in range(40):
        perform(fleet)
        deliver(fleet)
        fleet.tick(5.0)
        assert not [order for order in fleet.orders if isinstance(order, steps.Recover)]
    assert task(fleet).state == "asking"
    fleet.settle()
    assert (task(fleet).state, task(fleet).attempt) == ("done", 1)


@pytest.mark.parametrize(
    ("phase", "orders", "state"),
    [("copying", [], "waiting"), ("handed over", [steps.AskHost(host="a")], "asking")],
)
def test_a_cut_link_is_retried_before_the_commit_and_recovered_after_it(
    phase: str, orders: list[steps.Action], state: str
) -> None:
    fleet = world()
    first = task(fleet).move.destination
    reach(fleet, phase)
    fleet.fail("web", "connection-lost")
    deliver(fleet)
    assert (task(fleet).state, fleet.orders) == (state, orders)
    fleet.settle()
    assert task(fleet).state == "done"
    assert (task(fleet).attempt, task(fleet).owner == first) == (2, False)


def test_a_destination_that_is_gone_before_the_start_is_replaced() -> None:
    fleet = world(limits=Limits(per_host=1))
    other = {"b": "c", "c": "b"}[task(fleet).move.destination]
    fleet.down.add(task(fleet).move.destination)
    perform(fleet)
    deliver(fleet)
    fleet.tick(2.0)
    assert [order.move.destination for order in started(fleet)] == [other]


def test_a_full_destination_is_asked_and_replaced() -> None:
    fleet = world()
    first = task(fleet).move.destination
    fleet.full.add(first)
    perform(fleet)
    deliver(fleet)
    assert fleet.orders == [steps.AskHost(host=first)]
    fleet.tick(2.0)
    assert started(fleet)[0].move.destination != first
    fleet.settle()
    assert task(fleet).state == "done"


def test_a_fleet_without_another_destination_leaves_the_workload_at_the_source() -> None:
    fleet = world(hosts=2, limits=Limits(attempts=2))
    fleet.full.add("b")
    for _ in range(10):
        perform(fleet)
        deliver(fleet)
        fleet.tick(5.0)
    assert (task(fleet).state, task(fleet).owner, task(fleet).starts) == ("given-up", "a", 2)
    assert "free memory" in fleet.instructions["web"].remedy


def test_a_workload_that_writes_too_fast_is_moved_in_another_mode() -> None:
    fleet = world()
    reach(fleet, "copying")
    fleet.fail("web", "not-converging")
    deliver(fleet)
    fleet.tick(2.0)
    assert [order.move.mode for order in started(fleet)] == ["hybrid"]


def test_a_clone_that_writes_too_fast_is_throttled_then_given_up_with_a_remedy() -> None:
    fleet = world(cannot={"hybrid": "a clone", "postcopy": "a clone"})
    reach(fleet, "copying")
    fleet.fail("web", "not-converging")
    deliver(fleet)
    fleet.tick(2.0)
    (order,) = started(fleet)
    assert (order.move.mode, order.move.auto_converge) == ("precopy", True)
    reach(fleet, "copying")
    fleet.fail("web", "not-converging")
    deliver(fleet)
    assert task(fleet).state == "given-up"
    assert "reduce the load of web" in fleet.instructions["web"].remedy


def test_a_workload_that_neither_host_has_is_reported_as_lost() -> None:
    fleet = world()
    reach(fleet, "handed over")
    fleet.restart_head()
    fleet.end_workload("web")
    for _ in range(10):
        perform(fleet)
        deliver(fleet)
        fleet.tick(5.0)
    assert task(fleet).state == "stuck"
    assert "neither a nor" in fleet.instructions["web"].reason


@pytest.mark.parametrize(("phase", "state"), [("copying", "given-up"), ("handed over", "done"), ("decided", "done")])
def test_a_cancelled_plan_ends_moves_before_their_commit_only(phase: str, state: str) -> None:
    fleet = world()
    reach(fleet, phase)
    deliver(fleet)
    fleet.tell(steps.CancelRequested())
    assert fleet.orders == [steps.CancelMove(workload="web", source="a", attempt=1)]
    if phase == "copying":
        perform(fleet)
    else:
        fleet.orders.clear()  # the move does not react after its commit
    fleet.settle()
    assert (task(fleet).state, task(fleet).owner) == (state, fleet.owner["web"])


def test_events_about_an_earlier_start_are_ignored() -> None:
    fleet = world()
    reach(fleet, "copying")
    fleet.fail("web", "refused")
    deliver(fleet)
    fleet.tick(2.0)
    fleet.tell(steps.Ended(workload="web", attempt=1, outcome="done"))
    assert (task(fleet).state, task(fleet).attempt, task(fleet).owner) == ("moving", 2, "a")


def test_attempts_of_a_new_execution_exceed_those_of_earlier_ones() -> None:
    fleet = world()
    plan = planning.evacuate(fleet.view, ["a"])
    actions = Execution(fleet.view, plan, first_attempt=1000).start(0.0)
    assert [action.attempt for action in actions if isinstance(action, steps.StartMove)] == [1000]


def test_no_more_moves_than_allowed_run_at_the_same_time() -> None:
    every = tuple(Host(name=name, memory=640 * MIB, link=MIB) for name in "abcdefgh")
    moved = tuple(
        Workload(name=f"w{number}", host="a", memory=8 * MIB, private=8 * MIB, dirty_rate=1000) for number in range(9)
    )
    view = View(hosts=every, workloads=moved)
    fleet = World(view, planning.evacuate(view, ["a"], limits=Limits(per_host=3)))
    while not fleet.execution.finished:
        moving = [one for one in fleet.execution.tasks.values() if one.state == "moving"]
        assert len(moving) <= 3
        perform(fleet)
        for name in list(fleet.lives):
            fleet.advance(name)
        deliver(fleet)
    assert {one.state for one in fleet.execution.tasks.values()} == {"done"}


def test_a_cancelled_move_that_was_in_doubt_is_not_started_again() -> None:
    fleet = world()
    reach(fleet, "copying")
    fleet.news.clear()
    fleet.lives.pop("web")
    fleet.tell(steps.Ended(workload="web", attempt=1, outcome="unknown", cause="cancelled", reason="cancelled"))
    fleet.tell(steps.Recovered(workload="web", attempt=1, owner="source"))
    assert (task(fleet).state, task(fleet).owner, task(fleet).starts) == ("given-up", "a", 1)
