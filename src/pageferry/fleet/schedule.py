"""Schedule of moves: starts them by `admission` with predicted durations, and records when each starts."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from pageferry.fleet import costs
from pageferry.fleet.admission import Admission, Grant, Request
from pageferry.fleet.capacity import Capacity
from pageferry.fleet.costs import Costs, Load
from pageferry.fleet.links import Network
from pageferry.fleet.model import Limits, Mode, Move, Peak, View, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Workload with the destination that was chosen for it."""

    workload: Workload
    destination: str
    shares: bool
    """Whether it shares the memory of its image at the destination."""
    why: str
    """Reason for the destination."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Moves in the order of their start."""

    moves: tuple[Move, ...]
    peaks: tuple[Peak, ...]
    makespan: float


@dataclass(slots=True)
class Scheduler:
    """Scheduler of the moves of one view."""

    view: View
    limits: Limits
    model: Costs
    sizes: Mapping[str, int]
    """Memory of a base of each image, bytes."""
    modes: dict[str, Mode] = field(default_factory=dict)
    """Modes that replace the predicted ones, by workload."""

    def run(self, choices: Sequence[Choice]) -> Schedule:
        """Return the schedule. Long moves start before short ones, so that the last moves are short."""
        network = Network(self.view, self.limits)
        admission = Admission(network, self.limits, self.model)
        for priority, request in enumerate(self._ordered(choices, network)):
            admission.submit(request, priority)
        moves, now = [], 0.0
        running: list[tuple[float, int, Grant]] = []
        while True:
            for grant in admission.starts():
                moves.append(_planned(grant, now))
                heapq.heappush(running, (now + grant.seconds, len(moves), grant))
            if not running:
                return Schedule(tuple(moves), network.peaks(), now)
            now, _, ended = heapq.heappop(running)
            admission.release(ended)
            while running and running[0][0] == now:
                admission.release(heapq.heappop(running)[2])

    def request(self, choice: Choice, network: Network) -> Request:
        """Return the request for a move, with its mode."""
        workload = choice.workload
        path = network.path(workload.host, choice.destination)
        volume = costs.occupied(workload, choice.shares, self.sizes)
        mode, throttle, why = costs.choose_mode(workload, volume, min(path.rate, self.model.rate), self.model)
        if workload.name in self.modes:
            mode, throttle, why = self.modes[workload.name], False, "chosen for the deadline"
        return Request(
            move=Move(
                workload=workload.name,
                source=workload.host,
                destination=choice.destination,
                mode=mode,
                bytes=volume,
                seconds=0.0,
                downtime=0.0,
                auto_converge=throttle,
                shares_base=choice.shares,
                reason=f"{choice.why}; {mode}: {why}",
            ),
            load=Load(volume, workload.dirty_rate, mode, throttle),
            least=costs.least_rate(workload, mode),
            path=path,
        )

    def _ordered(self, choices: Sequence[Choice], network: Network) -> list[Request]:
        requests = [self.request(choice, network) for choice in choices]
        left: dict[str, float] = {}
        for request in requests:
            left[request.move.source] = left.get(request.move.source, 0.0) + _alone(request, self.model)
        # The host with the most work left sends first; of its workloads, the one with the longest move.
        requests.sort(key=lambda request: -_alone(request, self.model))
        ranks = []
        for request in requests:
            ranks.append(-left[request.move.source])
            left[request.move.source] -= _alone(request, self.model)
        order = sorted(range(len(requests)), key=lambda number: ranks[number])
        return [requests[number] for number in order]


def _alone(request: Request, model: Costs) -> float:
    """Return the duration of the move if it used its path alone, seconds."""
    return costs.predict(request.load, min(request.path.rate, model.rate), model).seconds


def _planned(grant: Grant, now: float) -> Move:
    return replace(
        grant.request.move,
        bytes=grant.bytes,
        seconds=grant.seconds,
        downtime=grant.downtime,
        rate=round(grant.rate),
        start=now,
    )


def lower_bound(choices: Iterable[Choice], view: View, capacity: Capacity, closed: frozenset[str]) -> float:
    """Return the minimum duration of any plan that moves these workloads away from their hosts, seconds.

    Each workload sends at least its private pages if a host of the fleet has its image, otherwise all pages. All of
    this crosses the interface of its host. It crosses a shared link if all hosts behind this link are in `closed`,
    which are not destinations.
    """
    hosts = {host.name: host for host in view.hosts}
    available = {one for host in view.hosts for one in host.images | host.bases if host.name not in closed}
    available.update(base for room in capacity.rooms.values() if room.host.name not in closed for base in room.bases)
    open_links = {name for host in view.hosts if host.name not in closed for name in host.uplinks}
    rates = {link.name: link.rate for link in view.links if link.name not in open_links}
    loads: dict[tuple[str, str], int] = {}
    for choice in choices:
        workload = choice.workload
        volume = costs.occupied(workload, workload.base in available, capacity.sizes)
        host = hosts[workload.host]
        for key in (("host", host.name), *(("link", name) for name in host.uplinks if name in rates)):
            loads[key] = loads.get(key, 0) + volume
    return max(
        (volume / (hosts[name].link if kind == "host" else rates[name]) for (kind, name), volume in loads.items()),
        default=0.0,
    )
