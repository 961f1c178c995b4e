"""First-fit, the peer of the planner: it knows the memory of hosts, but neither images, links nor dirty rates.

Each workload goes to the first host, in the order of their names, that has its whole memory free. It is sent in full,
in pre-copy. A source sends two workloads at the same time, as KubeVirt does by default
(`parallelOutboundMigrationsPerNode`), in the order of their names; nothing limits the number of moves to a host.
"""

from __future__ import annotations

from collections import deque

from pageferry.fleet import costs, steps
from pageferry.fleet.capacity import Capacity
from pageferry.fleet.model import Move, View

OUTBOUND = 2


class FirstFit:
    """Controller of the moves."""

    def __init__(self, view: View, hosts: frozenset[str]) -> None:
        self._queues: dict[str, deque[Move]] = {}
        self.unplaced = 0
        self._active = 0
        self.given_up = 0
        self._attempts: dict[str, int] = {}
        self._moves: dict[str, Move] = {}
        for move in self._choose(view, hosts):
            self._queues.setdefault(move.source, deque()).append(move)

    def _choose(self, view: View, hosts: frozenset[str]) -> list[Move]:
        capacity = Capacity(view)
        free = {name: room.free for name, room in capacity.rooms.items() if name not in hosts}
        groups = {name: set(room.groups) for name, room in capacity.rooms.items()}
        names, found = sorted(free), []
        for workload in sorted((one for one in view.workloads if one.host in hosts), key=lambda one: one.name):
            need = costs.occupied(workload, False, capacity.sizes)
            place = next((name for name in names if free[name] >= need and workload.group not in groups[name]), None)
            if place is None:
                self.unplaced += 1
                continue
            free[place] -= need
            if workload.group is not None:
                groups[place].add(workload.group)
            found.append(
                Move(
                    workload=workload.name,
                    source=workload.host,
                    destination=place,
                    mode="precopy",
                    bytes=need,
                    seconds=0.0,
                    downtime=0.0,
                )
            )
        return found

    @property
    def wake_at(self) -> float | None:
        """No timer is used."""
        return None

    @property
    def finished(self) -> bool:
        """Whether no move runs or waits."""
        return not self._active and not any(self._queues.values())

    def start(self, _: float) -> list[steps.Action]:
        """Start the first moves of each source."""
        return [action for source in self._queues for _ in range(OUTBOUND) for action in self._next(source)]

    def handle(self, event: steps.StepEvent, _: float) -> list[steps.Action]:
        """Start the next move of a source when a move has ended. A failed move is not repeated."""
        if not isinstance(event, steps.Ended):
            return []
        self._active -= 1
        self.given_up += event.outcome != "done"
        return self._next(self._moves[event.workload].source)

    def _next(self, source: str) -> list[steps.Action]:
        if not self._queues[source]:
            return []
        move = self._queues[source].popleft()
        self._active += 1
        self._moves[move.workload] = move
        return [steps.StartMove(move=move, attempt=1)]
