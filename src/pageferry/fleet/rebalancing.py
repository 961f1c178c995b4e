"""Plan that levels the memory use of hosts with few moves.

A host is overloaded if it uses more than the average part of its memory plus a tolerance. The plan moves workloads from
the most loaded host first, and of its workloads the one that frees the most memory per byte sent, until no host is
overloaded or no move helps. A workload is moved at most once, and only to a host that is not overloaded afterwards.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from pageferry.fleet import costs, movable
from pageferry.fleet.capacity import Capacity, Room
from pageferry.fleet.costs import Costs
from pageferry.fleet.evacuation import plan_of
from pageferry.fleet.model import Limits, Plan, View, Workload
from pageferry.fleet.schedule import Choice, Scheduler, lower_bound
from pageferry.fleet.tiers import Tier


def used(room: Room) -> float:
    """Return the used part of the memory of a host."""
    return room.used / room.limit if room.limit > 0 else 1.0


def rebalance(view: View, tolerance: float, limits: Limits, model: Costs) -> Plan:
    """Return a plan that levels the memory use of hosts. See `planning.rebalance`."""
    capacity = Capacity(view)
    leveller = Leveller(view, capacity, tolerance, limits)
    choices = leveller.choose()
    schedule = Scheduler(view=view, limits=limits, model=model, sizes=capacity.sizes).run(choices)
    return plan_of(schedule, (), limits, bound=lower_bound(choices, view, capacity, frozenset()))


@dataclass(slots=True)
class Leveller:
    """Choice of the moves that level the memory use.

    Departures reduce the memory use of a host in `_left` only: `Capacity` counts a workload on both hosts until its
    move has ended.
    """

    view: View
    capacity: Capacity
    tolerance: float
    limits: Limits

    def choose(self) -> list[Choice]:
        """Return the moves, the largest benefit first."""
        rooms = [room for room in self.capacity.rooms.values() if room.host.reachable and room.limit > 0]
        open_rooms = [room for room in rooms if not room.host.draining]
        if len(open_rooms) < 2:
            return []
        average = sum(room.used for room in open_rooms) / sum(room.limit for room in open_rooms)
        most = min(average + self.tolerance, 1.0)
        destinations = Destinations(open_rooms, self.capacity, most, self.limits)
        queue = [(-used(room), room.host.name) for room in open_rooms if used(room) > most]
        heapq.heapify(queue)
        candidates, _ = movable.divide(self._of({name for _, name in queue}), self.view)
        by_host: dict[str, list[Workload]] = {}
        for workload in candidates:
            by_host.setdefault(workload.host, []).append(workload)
        choices: list[Choice] = []
        while queue:
            _, name = heapq.heappop(queue)
            choices += self._relieve(self.capacity.rooms[name], by_host.get(name, []), most, destinations)
        return choices

    def _of(self, hosts: set[str]) -> Iterable[Workload]:
        return (workload for workload in self.view.workloads if workload.host in hosts)

    def _relieve(
        self, room: Room, workloads: list[Workload], most: float, destinations: Destinations
    ) -> Iterable[Choice]:
        """Move workloads away from one host until it is not overloaded. The largest ones that do not free more than
        necessary are moved first, because fewer moves are then required."""
        excess = room.used - most * room.limit
        frees = {one.name: costs.occupied(one, one.base in room.bases, self.capacity.sizes) for one in workloads}
        waiting = sorted(workloads, key=lambda one: (frees[one.name] > excess, -frees[one.name], one.dirty_rate or 0))
        for workload in waiting:
            if excess <= 0:
                return
            if frees[workload.name] < excess * MIN_BENEFIT:
                continue
            destination = destinations.choose(workload)
            if destination is not None:
                excess -= frees[workload.name]
                yield destinations.take(workload, destination)


MIN_BENEFIT = 0.02
"""Minimum memory that a move frees, as a part of what the host must free. It keeps small workloads where they are."""


class Destinations:
    """Hosts below the level, the emptiest first; for a clone, those with its image first."""

    def __init__(self, rooms: Iterable[Room], capacity: Capacity, most: float, limits: Limits) -> None:
        self._capacity = capacity
        self._most = most
        self._limits = limits
        self._rooms = list(rooms)
        self._all = Tier(self._rooms, used)
        self._holders: dict[str, Tier] = {}

    def choose(self, workload: Workload) -> str | None:
        """Return the destination that is the emptiest afterwards; None if every host would be overloaded."""
        tiers = [(self._all, False)] if workload.base is None else [(self._with(workload), True), (self._all, False)]
        for tier, shares in tiers:
            room = tier.best(
                lambda room: self._accepts(workload, room), costs.occupied(workload, shares, self._capacity.sizes)
            )
            if room is not None:
                return room.host.name
        return None

    def take(self, workload: Workload, destination: str) -> Choice:
        """Count the workload on the destination, and return the choice."""
        room = self._capacity.rooms[destination]
        shares = room.shares(workload)
        self._capacity.stage(workload, destination)
        self._capacity.add(workload, destination)
        return Choice(workload=workload, destination=destination, shares=shares, why="uses less memory")

    def _with(self, workload: Workload) -> Tier:
        base = str(workload.base)
        if base not in self._holders:
            self._holders[base] = Tier([room for room in self._rooms if room.shares(workload)], used)
        return self._holders[base]

    def _accepts(self, workload: Workload, room: Room) -> bool:
        name = room.host.name
        if name == workload.host or self._capacity.refusal(workload, name, moving=self._limits.per_host) is not None:
            return False
        return room.used + self._capacity.need(workload, name) <= self._most * room.limit
