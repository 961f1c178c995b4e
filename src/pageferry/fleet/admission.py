"""Admission of moves: which waiting move starts next, and at which rate.

A move starts if both hosts may run one more move, every link on its path may carry one more, and the links have enough
rate left. A caller may add conditions, such as memory. A move that cannot start waits for the first missing resource,
and is examined again when this resource is released. Moves that wait for one resource start in the order of their
priority. The planner and the execution use the same admission, so a plan states the order that the execution follows.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from pageferry.fleet import costs
from pageferry.fleet.costs import Costs, Load
from pageferry.fleet.links import ENOUGH, PARALLEL_UPLINK, Network, Path
from pageferry.fleet.model import Limits, Move

Resource = Hashable
"""A direction of a link (int), `("host", NAME)`, or a resource of the caller."""
Condition = Callable[[Move], Resource | None]
"""Additional condition of the caller: returns the resource that a move lacks, or None."""


@dataclass(frozen=True, slots=True)
class Request:
    """Waiting move with what admission needs to know about it."""

    move: Move
    load: Load
    least: int
    """Minimum rate at which the move converges, bytes per second. If the path is slower, the rate of the path is
    required."""
    path: Path


@dataclass(frozen=True, slots=True)
class Grant:
    """Admitted move."""

    request: Request
    reserved: float
    """Average rate over the whole move, which is reserved on the links, bytes per second."""
    rate: float
    """Rate of the transfer, bytes per second."""
    bytes: int
    seconds: float
    downtime: float


class Admission:
    """Waiting and running moves."""

    def __init__(self, network: Network, limits: Limits, model: Costs, condition: Condition = lambda _: None) -> None:
        self.network = network
        self.limits = limits
        self.model = model
        self._condition = condition
        self._ready: list[tuple[int, int, Request]] = []
        self._blocked: dict[Resource, list[tuple[int, int, Request]]] = {}
        self._released: dict[Resource, None] = {}
        """Resources that were released since they were examined, in this order."""
        self._withdrawn: set[int] = set()
        self._number = 0
        self._sending: Counter[str] = Counter()
        """Number of waiting moves by source."""
        self._receiving: Counter[str] = Counter()
        self._active: Counter[str] = Counter()
        """Number of running moves by host."""
        self._waiting: dict[str, int] = {}
        """Numbers of waiting moves by workload."""

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request, priority: int) -> None:
        """Add a waiting move. Moves with a lower priority number start first."""
        self._number += 1
        self._waiting[request.move.workload] = self._number
        self._sending[request.move.source] += 1
        self._receiving[request.move.destination] += 1
        heapq.heappush(self._ready, (priority, self._number, request))

    def withdraw(self, request: Request) -> None:
        """Remove a waiting move. Does nothing if it does not wait."""
        number = self._waiting.get(request.move.workload)
        if number is not None:
            self._withdrawn.add(number)
            self._leave(request)

    def starts(self) -> Iterator[Grant]:
        """Yield the moves that start now, and count them as running."""
        while self._ready:
            found, _ = self._examine(heapq.heappop(self._ready))
            if found is not None:
                yield found
        while self._released:
            resource = next(iter(self._released))
            del self._released[resource]
            yield from self._wake(resource)

    def release(self, grant: Grant) -> None:
        """End a running move."""
        move = grant.request.move
        self.network.release(grant.request.path, grant.reserved)
        self._active[move.source] -= 1
        self._active[move.destination] -= 1
        self.wake(("host", move.source))
        self.wake(("host", move.destination))
        for direction in grant.request.path.directions:
            self.wake(direction)

    def wake(self, resource: Resource) -> None:
        """Examine the moves that wait for a resource again, because it was released."""
        if self._blocked.get(resource):
            self._released[resource] = None

    def _wake(self, resource: Resource) -> Iterator[Grant]:
        waiting = self._blocked.get(resource, [])
        while waiting:
            found, lacks = self._examine(heapq.heappop(waiting))
            if lacks == resource:
                return
            if found is not None:
                yield found

    def _examine(self, entry: tuple[int, int, Request]) -> tuple[Grant | None, Resource | None]:
        """Start a move, or let it wait. Return its grant, or the resource for which it waits; neither if it was
        withdrawn."""
        _, number, request = entry
        if number in self._withdrawn:
            self._withdrawn.discard(number)
            return None, None
        lacks = self._lacks(request)
        grant = self._grant(request) if lacks is None else lacks
        if not isinstance(grant, Grant):
            heapq.heappush(self._blocked.setdefault(grant, []), entry)
            return None, grant
        self._leave(request)
        self.network.reserve(request.path, grant.reserved)
        self._active[request.move.source] += 1
        self._active[request.move.destination] += 1
        return grant, None

    def _leave(self, request: Request) -> None:
        move = request.move
        del self._waiting[move.workload]
        self._sending[move.source] -= 1
        self._receiving[move.destination] -= 1

    def _lacks(self, request: Request) -> Resource | None:
        move = request.move
        for host in (move.source, move.destination):
            if self._active[host] >= self.limits.per_host:
                return ("host", host)
        network = self.network
        for direction in request.path.directions:
            if network.is_shared(direction) and network.moves[direction] >= self.limits.per_link:
                return direction
        return self._condition(move)

    def _grant(self, request: Request) -> Grant | Resource:
        """Return the grant of a move, or the direction that has too little rate left."""
        wanted = min(self._wanted(request), self.model.rate)
        wanted = min(max(wanted, request.least), request.path.rate)
        enough = max(ENOUGH * wanted, min(request.least, request.path.rate))
        average = wanted
        for direction in request.path.directions:
            free = self.network.free(direction)
            if free < enough:
                return direction
            average = min(average, free)
        return self._granted(request, average)

    def _wanted(self, request: Request) -> float:
        """Return the rate that divides each link among the moves that can use it."""
        move, network, active = request.move, self.network, self._active
        first, *between, last = request.path.directions
        slots = self.limits.per_host
        senders = max(1, min(slots - active[move.source], self._sending[move.source]))
        receivers = max(1, min(slots - active[move.destination], self._receiving[move.destination]))
        return min(
            max(network.free(first) / senders, network.capacity[first] / slots),
            max(network.free(last) / receivers, network.capacity[last] / slots),
            *(network.capacity[direction] / PARALLEL_UPLINK for direction in between),
        )

    def _granted(self, request: Request, average: float) -> Grant:
        """Return the grant of a move whose average rate is `average`. Set-up and pause send nothing, so that the rate
        of the transfer is higher."""
        model = self.model
        most = min(request.path.rate, model.rate)
        first = costs.predict(request.load, average, model)
        rate = costs.rate_for(first.bytes, average, most, model)
        found = costs.predict(request.load, rate, model)
        reserved = min(average, found.bytes / found.seconds)
        return Grant(request, reserved, rate, found.bytes, found.seconds, found.downtime)
