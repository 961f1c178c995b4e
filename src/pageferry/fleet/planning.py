"""Plans: evacuate hosts, move one workload, level the memory use of hosts, place new clones.

Every function takes a view of the fleet and returns a `Plan`. It changes nothing, reads no clock, and returns the same
plan for the same view. A plan never overfills a host, whatever the order and the outcome of its moves: a workload is
counted on its source and on its destination until its move has ended. Each workload is placed, or named with the
reason.
"""

from __future__ import annotations

from collections.abc import Collection

from pageferry.errors import UsageError
from pageferry.fleet import cloning, evacuation, movable, rebalancing
from pageferry.fleet.capacity import Capacity
from pageferry.fleet.costs import Costs
from pageferry.fleet.model import Demand, Limits, Plan, Unplaced, View
from pageferry.fleet.placement import take
from pageferry.fleet.schedule import Choice, Scheduler, lower_bound

LIMITS = Limits()
COSTS = Costs()


def evacuate(
    view: View,
    hosts: Collection[str],
    *,
    deadline: float | None = None,
    limits: Limits = LIMITS,
    costs: Costs = COSTS,
) -> Plan:
    """Plan to move all workloads away from hosts, which get no other workloads.

    `hosts`: names. `deadline`: maximum duration, seconds; the plan states in `deadline_note` how it is met, or why it
    cannot be met. Raises UsageError for an unknown host.
    """
    _check_hosts(view, hosts, "evacuate")
    if deadline is not None and deadline <= 0:
        raise UsageError(f"invalid `deadline` {deadline!r}: expected a positive number of seconds")
    return evacuation.evacuate(view, frozenset(hosts), deadline, _checked(limits), costs)


def move(view: View, workload: str, destination: str, *, limits: Limits = LIMITS, costs: Costs = COSTS) -> Plan:
    """Plan to move one workload to a host. Raises UsageError for an unknown workload or host."""
    found = next((one for one in view.workloads if one.name == workload), None)
    if found is None:
        raise UsageError(
            f"cannot move {workload}: no workload of this name is in the fleet; see `pageferry fleet status`"
        )
    _check_hosts(view, [destination], f"move {workload} to")
    if found.host == destination:
        raise UsageError(f"cannot move {workload} to {destination}: it is on that host; choose another host")
    ready, fixed = movable.divide([found], view)
    capacity = Capacity(view)
    reason = capacity.refusal(found, destination)
    if ready and reason is not None:
        remedy = "choose another host, or end the reason"
        fixed.append(Unplaced(workload=workload, reason=f"{destination} cannot take it: {reason}", remedy=remedy))
    choices: list[Choice] = [] if fixed else [take(found, destination, capacity)]
    schedule = Scheduler(view=view, limits=_checked(limits), model=costs, sizes=capacity.sizes).run(choices)
    bound = lower_bound(choices, view, capacity, frozenset())
    return evacuation.plan_of(schedule, fixed, limits, bound=bound)


def rebalance(view: View, *, tolerance: float = 0.1, limits: Limits = LIMITS, costs: Costs = COSTS) -> Plan:
    """Plan to level the memory use of hosts with few moves.

    `tolerance`: part of its memory that a host may use above the average before workloads are moved away, 0 to 1.
    Raises UsageError for an invalid tolerance.
    """
    if not 0.0 <= tolerance <= 1.0:
        raise UsageError(f"invalid `tolerance` {tolerance!r}: expected 0 to 1")
    return rebalancing.rebalance(view, tolerance, _checked(limits), costs)


def place(view: View, demand: Demand, *, limits: Limits = LIMITS) -> Plan:
    """Plan to start clones of an image. Raises UsageError if the demand is invalid."""
    if demand.count < 1:
        raise UsageError(f"invalid `count` {demand.count!r}: expected at least 1")
    if "{n}" not in demand.name and demand.count > 1:
        raise UsageError(f"invalid `name` {demand.name!r}: expected {{n}} in the name of {demand.count} clones")
    if "{n}" not in demand.name and any(workload.name == demand.name for workload in view.workloads):
        raise UsageError(
            f"invalid `name` {demand.name!r}: a workload of this name is in the fleet; choose another name"
        )
    return cloning.place(view, demand, _checked(limits))


def _check_hosts(view: View, hosts: Collection[str], operation: str) -> None:
    unknown = sorted(set(hosts) - {host.name for host in view.hosts})
    if unknown:
        raise UsageError(
            f"cannot {operation} {unknown[0]}: no host of this name is in the fleet; see `pageferry fleet status`"
        )


def _checked(limits: Limits) -> Limits:
    """Check limits, and return them. Raises UsageError."""
    for name in ("per_host", "per_link", "attempts"):
        if getattr(limits, name) < 1:
            raise UsageError(f"invalid `{name}` {getattr(limits, name)!r}: expected at least 1")
    if not 0.0 < limits.link_share <= 1.0:
        raise UsageError(f"invalid `link_share` {limits.link_share!r}: expected more than 0, at most 1")
    return limits
