"""Plan that empties hosts.

1. Divide the workloads of the hosts into those that can be moved and those that cannot.
2. Choose a destination for each (`placement`): balanced over links, or by best fit if memory is scarce.
3. Choose a mode for each by its dirty rate against the rate of its path, and schedule the moves (`schedule`).
4. If the plan is longer than the deadline, switch the moves of the slowest hosts to post-copy, which sends each page
   once. If this is not enough, state by how much the deadline is missed, and which link causes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from pageferry.fleet import costs, movable
from pageferry.fleet.capacity import Capacity
from pageferry.fleet.costs import Costs
from pageferry.fleet.model import Host, Limits, Move, Plan, Unplaced, View, Workload
from pageferry.fleet.placement import BestFit, Spread, Strategy, choose_all
from pageferry.fleet.schedule import Choice, Schedule, Scheduler, lower_bound


def evacuate(view: View, hosts: frozenset[str], deadline: float | None, limits: Limits, model: Costs) -> Plan:
    """Return a plan that moves all workloads away from hosts. See `planning.evacuate`."""
    view = replace(view, hosts=tuple(_drained(host, host.name in hosts) for host in view.hosts))
    leaving, fixed = movable.divide((one for one in view.workloads if one.host in hosts), view)
    choices, homeless, capacity = _choose(view, leaving, hosts, limits)
    scheduler = Scheduler(view=view, limits=limits, model=model, sizes=capacity.sizes)
    schedule = scheduler.run(choices)
    bound = lower_bound(choices, view, capacity, frozenset(host.name for host in view.hosts if host.draining))
    note = None
    if deadline is not None:
        schedule, note = _hurry(scheduler, choices, schedule, deadline, bound)
    return plan_of(schedule, (*fixed, *homeless), limits, bound=bound, deadline=deadline, note=note)


def _drained(host: Host, draining: bool) -> Host:
    return replace(host, draining=True) if draining and not host.draining else host


def _choose(
    view: View, leaving: Sequence[Workload], hosts: frozenset[str], limits: Limits
) -> tuple[list[Choice], list[Unplaced], Capacity]:
    """Choose destinations by `Spread`; if a workload has no place, by `BestFit` if this places more."""
    eligible = [host.name for host in view.hosts if host.reachable and not host.draining]
    capacity = Capacity(view)
    strategy: Strategy = Spread(view, capacity, eligible, limits)
    choices, homeless = choose_all(leaving, strategy, capacity)
    if homeless:
        other = Capacity(view)
        found = choose_all(leaving, BestFit(other, eligible, limits), other)
        if len(found[1]) < len(homeless):
            return *found, other
    return choices, homeless, capacity


def _hurry(
    scheduler: Scheduler, choices: Sequence[Choice], schedule: Schedule, deadline: float, bound: float
) -> tuple[Schedule, str]:
    """Shorten a schedule to a deadline. Return the schedule, and the measures or the reason why it is too long."""
    if schedule.makespan <= deadline:
        return schedule, "met without other modes"
    late = {move.source for move in schedule.moves if move.start + move.seconds > deadline}
    workloads = {choice.workload.name: choice.workload for choice in choices}
    for move in schedule.moves:
        if move.source in late and _sends_more_than_once(move, workloads[move.workload], scheduler):
            scheduler.modes[move.workload] = "postcopy"
    faster = scheduler.run(choices) if scheduler.modes else schedule
    if faster.makespan < schedule.makespan:
        schedule = faster
        measures = f"{len(scheduler.modes)} moves use post-copy, which sends each page once"
    else:
        scheduler.modes.clear()
        measures = "no other mode is faster"
    if schedule.makespan <= deadline:
        return schedule, f"met: {measures}"
    ended = sum(move.start + move.seconds <= deadline for move in schedule.moves)
    links = (
        f"the links alone require {bound:.1f} s" if bound > deadline else f"the links alone would allow {bound:.1f} s"
    )
    return schedule, (
        f"cannot be met: the plan takes {schedule.makespan:.1f} s ({measures}; {links}); {ended} of "
        f"{len(schedule.moves)} moves end in time"
    )


def _sends_more_than_once(move: Move, workload: Workload, scheduler: Scheduler) -> bool:
    """Return whether post-copy is allowed, and would send less."""
    volume = costs.occupied(workload, move.shares_base, scheduler.sizes)
    return "postcopy" not in workload.cannot and move.bytes > volume * scheduler.model.overhead + 1


def plan_of(
    schedule: Schedule,
    unplaced: Sequence[Unplaced],
    limits: Limits,
    *,
    bound: float = 0.0,
    deadline: float | None = None,
    note: str | None = None,
) -> Plan:
    """Return the plan of a schedule."""
    return Plan(
        moves=schedule.moves,
        unplaced=tuple(unplaced),
        makespan=schedule.makespan,
        lower_bound=bound,
        bytes=sum(move.bytes for move in schedule.moves),
        peaks=schedule.peaks,
        deadline=deadline,
        deadline_note=note,
        limits=limits,
    )
