"""Other destinations for moves that have failed, during the execution of a plan."""

from __future__ import annotations

from collections.abc import Collection

from pageferry.fleet.capacity import Capacity, Room
from pageferry.fleet.model import View, Workload

CANDIDATES = 32
"""Number of suitable hosts that are compared."""


class Substitutes:
    """Search for a destination among the hosts of a view. Hosts that the plan empties are excluded."""

    def __init__(self, view: View, capacity: Capacity, excluded: Collection[str]) -> None:
        self._capacity = capacity
        self._names = [host.name for host in view.hosts if host.name not in excluded]
        self._holders: dict[str, list[str]] = {}
        for name in self._names:
            host = capacity.rooms[name].host
            for image in host.images | host.bases | capacity.rooms[name].bases.keys():
                self._holders.setdefault(image, []).append(name)
        self._next = 0

    def choose(self, workload: Workload, refused: Collection[str]) -> str | None:
        """Return the suitable host with the smallest used part of its memory, of those with the image first; None if
        no host is suitable."""
        holders = self._holders.get(workload.base, []) if workload.base is not None else []
        for names, first in ((holders, 0), (self._names, self._next)):
            found = self._suitable(workload, names, first, refused)
            if found:
                return min(found, key=lambda room: room.used / max(room.limit, 1)).host.name
        return None

    def _suitable(self, workload: Workload, names: list[str], first: int, refused: Collection[str]) -> list[Room]:
        """Return up to `CANDIDATES` suitable hosts, beginning with the host of number `first`.

        Successive searches begin at different hosts, so that the moves of a failed host are spread.
        """
        found = []
        for step in range(len(names)):
            number = (first + step) % len(names)
            name = names[number]
            if name == workload.host or name in refused:
                continue
            if self._capacity.refusal(workload, name) is None:
                found.append(self._capacity.rooms[name])
                if len(found) == CANDIDATES:
                    self._next = number + 1
                    break
        return found
