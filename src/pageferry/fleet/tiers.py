"""Hosts in the order of their load, for searches that accept the first suitable host.

The load of a host is the larger of its own load and the load of its shared links. A move over a shared link changes the
load of all hosts behind this link. Hosts with the same shared links are therefore one group, in the order of their own
load, and the groups are in the order of their load. Loads only increase while a plan is made, so an entry of a heap is
out of date only if it is too low; it is corrected when it is found.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterable

from pageferry.fleet.capacity import Room

PROBES = 64
"""Number of hosts that are examined in the order of their load, before hosts are examined in the order of their free
memory."""

OwnLoad = Callable[[Room], float]
LinkLoad = Callable[[tuple[str, ...]], float]
Key = tuple[float, int, int]
"""Load, negative free memory in bytes, and number of a host."""


def no_load(_: tuple[str, ...]) -> float:
    """Return the load of shared links if they do not matter."""
    return 0.0


class Tier:
    """Hosts that are equally suitable, except for their load."""

    def __init__(self, rooms: Iterable[Room], own: OwnLoad, of_links: LinkLoad = no_load) -> None:
        self._own = own
        self._of_links = of_links
        self._rooms = list(rooms)
        self._by_free = [(-room.free, number) for number, room in enumerate(self._rooms)]
        self._members: dict[tuple[str, ...], list[Key]] = {}
        for number, room in enumerate(self._rooms):
            links = room.host.uplinks if of_links is not no_load else ()
            self._members.setdefault(links, []).append(self._key(number))
        self._groups = [(0.0, number, links) for number, links in enumerate(self._members)]
        heapq.heapify(self._by_free)
        for members in self._members.values():
            heapq.heapify(members)

    def best(self, accepts: Callable[[Room], bool], need: int) -> Room | None:
        """Return the accepted host with the lowest load, or after `PROBES` refusals the one with the most free memory.

        `need`: minimum memory that the workload adds to any host of the tier, bytes.
        """
        if not self._rooms or -self._most_free()[0] < need:
            return None
        probes = 0
        in_order = self._in_order()
        try:
            for room in in_order:
                if accepts(room):
                    return room
                probes += 1
                if probes == PROBES:
                    break
        finally:
            in_order.close()
        return None if probes < PROBES else self._with_most_memory(accepts, need)

    def _key(self, number: int) -> Key:
        room = self._rooms[number]
        return self._own(room), -room.free, number

    def _in_order(self) -> Generator[Room]:
        """Yield hosts by their load. Entries that were taken from the heaps are put back at the end."""
        taken: list[tuple[list[Key], Key]] = []
        opened: dict[tuple[str, ...], int] = {}
        groups = self._groups
        try:
            while groups:
                _, number, links = heapq.heappop(groups)
                current = self._load_of(links)
                if current is None:
                    opened[links] = number
                elif groups and current > groups[0][0]:
                    heapq.heappush(groups, (current, number, links))
                else:
                    members = self._members[links]
                    entry = heapq.heappop(members)
                    taken.append((members, entry))
                    heapq.heappush(groups, (current, number, links))
                    opened[links] = number
                    yield self._rooms[entry[2]]
        finally:
            for members, entry in taken:
                heapq.heappush(members, entry)
            self._restore(opened)

    def _restore(self, opened: dict[tuple[str, ...], int]) -> None:
        """Correct the entries of groups whose hosts were put back: their load may be lower than in the heap."""
        if opened:
            self._groups = [entry for entry in self._groups if entry[2] not in opened]
            self._groups += [(self._load_of(links) or 0.0, number, links) for links, number in opened.items()]
            heapq.heapify(self._groups)

    def _load_of(self, links: tuple[str, ...]) -> float | None:
        """Return the load of the least loaded host of a group, and correct the top of its heap; None without hosts."""
        members = self._members[links]
        while members:
            current = self._key(members[0][2])
            if current == members[0]:
                return max(current[0], self._of_links(links))
            heapq.heapreplace(members, current)
        return None

    def _with_most_memory(self, accepts: Callable[[Room], bool], need: int) -> Room | None:
        aside, found = [], None
        while self._by_free and found is None:
            entry = self._most_free()
            room = self._rooms[entry[1]]
            if -entry[0] < need:
                break
            aside.append(heapq.heappop(self._by_free))
            found = room if accepts(room) else None
        for entry in aside:
            heapq.heappush(self._by_free, entry)
        return found

    def _most_free(self) -> tuple[int, int]:
        """Return the entry of the host with the most free memory."""
        while True:
            free, number = self._by_free[0]
            current = -self._rooms[number].free
            if current == free:
                return free, number
            heapq.heapreplace(self._by_free, (current, number))
