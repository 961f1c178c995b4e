"""Choice of a destination for each workload.

`Spread` gives every workload to the host that would have received all of its workloads first: it balances the bytes
over interfaces and shared links, and prefers hosts that have the image of a clone. `BestFit` gives it to the host on
which it leaves the least memory free; it places more workloads if memory is scarce. Both place large workloads first,
and use `Capacity` for memory, bases and anti-affinity. Memory that a plan frees is not used by the same plan, so the
order and the failure of moves cannot overfill a host.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from pageferry.fleet import costs
from pageferry.fleet.capacity import Capacity, Room
from pageferry.fleet.model import Limits, Unplaced, View, Workload
from pageferry.fleet.schedule import Choice
from pageferry.fleet.tiers import Tier

OWN_COPY = 2.0
"""Factor on the expected time of a clone that would not share its image at the destination, because it occupies more
memory there from then on."""


class Strategy(Protocol):
    """Choice of destinations."""

    def choose(self, workload: Workload) -> str | None:
        """Return the destination of a workload; None if no host can take it."""

    def placed(self, workload: Workload, destination: str) -> None:
        """Record that the workload was placed."""


class Spread:
    """Destinations by the time until they have received everything that was placed on them."""

    def __init__(self, view: View, capacity: Capacity, eligible: Collection[str], limits: Limits) -> None:
        self._capacity = capacity
        self._limits = limits
        self._rates = {link.name: link.rate for link in view.links}
        self._hosts = {host.name: host for host in view.hosts}
        self._incoming: dict[tuple[str, str], int] = {}
        """Bytes placed on hosts and shared links."""
        self._rooms = [capacity.rooms[name] for name in eligible]
        self._tiers: dict[str | None, Tier] = {}
        self._holders: dict[str, list[Room]] = {}
        for room in self._rooms:
            for base in room.host.images | room.host.bases | room.bases.keys():
                self._holders.setdefault(base, []).append(room)

    def choose(self, workload: Workload) -> str | None:
        """Return the host that receives the workload first, or None."""

        def accepts(room: Room) -> bool:
            return self._capacity.refusal(workload, room.host.name, moving=self._limits.per_host) is None

        found = []
        for tier, shares in self._tiers_for(workload):
            room = tier.best(accepts, costs.occupied(workload, shares, self._capacity.sizes))
            if room is not None:
                found.append((self._expected(workload, room), room.host.name))
        return min(found)[1] if found else None

    def placed(self, workload: Workload, destination: str) -> None:
        """Add the bytes of the workload to the links of its destination."""
        room = self._capacity.rooms[destination]
        volume = costs.occupied(workload, room.shares(workload), self._capacity.sizes)
        shared = set(self._hosts[workload.host].uplinks)
        crossed = (("link", name) for name in room.host.uplinks if name not in shared)
        for key in (("host", destination), *crossed):
            self._incoming[key] = self._incoming.get(key, 0) + volume

    def _tiers_for(self, workload: Workload) -> Iterator[tuple[Tier, bool]]:
        if workload.base is not None and workload.base in self._holders:
            yield self._tier(workload.base), True
        yield self._tier(None), False

    def _tier(self, base: str | None) -> Tier:
        if base not in self._tiers:
            rooms = self._rooms if base is None else self._holders[base]
            self._tiers[base] = Tier(rooms, self._of_interface, self._of_links)
        return self._tiers[base]

    def _of_interface(self, room: Room) -> float:
        """Return the time in which the interface of a host receives what was placed on the host, seconds."""
        return self._incoming.get(("host", room.host.name), 0) / room.host.link

    def _of_links(self, names: tuple[str, ...]) -> float:
        """Return the same time for the slowest of several shared links."""
        rates, incoming = self._rates, self._incoming
        return max((incoming.get(("link", name), 0) / rates[name] for name in names if name in rates), default=0.0)

    def _expected(self, workload: Workload, room: Room) -> float:
        shares = room.shares(workload)
        volume = costs.occupied(workload, shares, self._capacity.sizes)
        factor = 1.0 if shares or workload.base is None else OWN_COPY
        load = max(self._of_interface(room), self._of_links(room.host.uplinks))
        return (load + volume / room.host.link) * factor


class BestFit:
    """Destinations by the memory that the workload leaves free."""

    def __init__(self, capacity: Capacity, eligible: Collection[str], limits: Limits) -> None:
        self._capacity = capacity
        self._limits = limits
        self._rooms = [capacity.rooms[name] for name in eligible]
        self._by_free = sorted((room.free, room.host.name) for room in self._rooms)
        self._holders: dict[str, list[str]] = {}
        for room in self._rooms:
            for base in room.host.images | room.host.bases | room.bases.keys():
                self._holders.setdefault(base, []).append(room.host.name)

    def choose(self, workload: Workload) -> str | None:
        """Return the host with the least free memory that has enough, of those with the image first, or None."""
        capacity = self._capacity
        holders = self._holders.get(workload.base, []) if workload.base is not None else []
        for name in sorted(
            holders, key=lambda name: (not capacity.rooms[name].holds(workload), capacity.rooms[name].free)
        ):
            if self._accepts(workload, name):
                return name
        need = costs.occupied(workload, False, capacity.sizes)
        for number in range(bisect_left(self._by_free, (need, "")), len(self._by_free)):
            if self._accepts(workload, self._by_free[number][1]):
                return self._by_free[number][1]
        return None

    def _accepts(self, workload: Workload, name: str) -> bool:
        return self._capacity.refusal(workload, name, moving=self._limits.per_host) is None

    def placed(self, workload: Workload, destination: str) -> None:
        """Sort the destination by its free memory again."""
        need = self._capacity.need(workload, destination)
        free = self._capacity.rooms[destination].free
        del self._by_free[bisect_left(self._by_free, (free, destination))]
        insort(self._by_free, (free - need, destination))


def choose_all(
    workloads: Sequence[Workload], strategy: Strategy, capacity: Capacity
) -> tuple[list[Choice], list[Unplaced]]:
    """Choose a destination for each workload, the largest first, and count the workloads there."""
    choices, homeless = [], []
    sizes = capacity.sizes
    order = sorted(workloads, key=lambda one: (-costs.occupied(one, False, sizes), one.name))
    for workload in order:
        destination = strategy.choose(workload)
        if destination is None:
            homeless.append(workload)
            continue
        strategy.placed(workload, destination)
        choices.append(take(workload, destination, capacity))
    return choices, no_room(homeless, capacity)


def take(workload: Workload, destination: str, capacity: Capacity) -> Choice:
    """Count a workload on its destination, and return the choice."""
    room = capacity.rooms[destination]
    shares = room.shares(workload)
    if workload.base is None:
        why = "has enough memory"
    elif room.holds(workload):
        why = "shares the base there"
    elif shares:
        why = "has the image of the clone"
    else:
        why = "no host with the image is free, so that all pages are sent"
    capacity.stage(workload, destination)
    capacity.add(workload, destination)
    return Choice(workload=workload, destination=destination, shares=shares, why=why)


def no_room(workloads: Sequence[Workload], capacity: Capacity) -> list[Unplaced]:
    """Return the reasons why no host can take these workloads."""
    if not workloads:
        return []
    rooms = [room for room in capacity.rooms.values() if room.host.reachable and not room.host.draining]
    rooms.sort(key=lambda room: -room.free)
    return [_no_room(workload, rooms, capacity) for workload in workloads]


def _no_room(workload: Workload, rooms: Sequence[Room], capacity: Capacity) -> Unplaced:
    """`rooms`: hosts that accept workloads, the one with the most free memory first."""
    largest = next((room for room in rooms if room.host.name != workload.host), None)
    if largest is None:
        return Unplaced(
            workload=workload.name,
            reason="no other host is reachable and accepts workloads",
            remedy="join hosts to the fleet, or end the draining of a host",
        )
    need = costs.occupied(workload, False, capacity.sizes)
    if workload.group is not None and workload.group in largest.groups and largest.free >= need:
        return Unplaced(
            workload=workload.name,
            reason=f"every host with enough memory runs a workload of its group {workload.group}",
            remedy="add a host, or remove the workload from the group",
        )
    return Unplaced(
        workload=workload.name,
        reason=f"it needs {need >> 20} MiB, and additional memory while it is moved; at most "
        f"{max(largest.free, 0) >> 20} MiB are free on any host",
        remedy="add a host, shut down workloads, or reduce the headroom",
    )
