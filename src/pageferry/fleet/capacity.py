"""Memory of hosts and its users: workloads, bases, and moves whose outcome is open.

A base is counted once per host, for as long as a workload of the host shares it. A workload of which a move is running,
or has an unknown outcome, is counted on both hosts. Freed memory is therefore never assumed before the owner is known.
"""

from __future__ import annotations

from collections.abc import Mapping

from pageferry.fleet import costs
from pageferry.fleet.model import Host, View, Workload


class Room:
    """Memory of one host, with its users."""

    __slots__ = ("bases", "groups", "host", "limit", "staged", "used", "users")

    def __init__(self, host: Host) -> None:
        self.host = host
        self.limit = host.memory - host.headroom
        """Memory that workloads and bases may use, bytes."""
        self.used = 0
        """Memory of workloads and bases, bytes."""
        self.staged = 0
        """Largest additional memory of a planned incoming move, bytes."""
        self.bases: dict[str, int] = {}
        """Number of users of each base."""
        self.groups: dict[str, int] = {}
        """Number of workloads of each anti-affinity group."""
        self.users: dict[str, tuple[Workload, bool]] = {}
        """Workloads by name, each with whether it shares its base."""

    @property
    def free(self) -> int:
        """Memory that is not used, bytes; negative if the host is overfilled."""
        return self.limit - self.used

    def shares(self, workload: Workload) -> bool:
        """Return whether the workload would share a base on this host."""
        base = workload.base
        return base is not None and (base in self.bases or base in self.host.images or base in self.host.bases)

    def holds(self, workload: Workload) -> bool:
        """Return whether the base of the workload is in use on this host, so that it needs no further memory."""
        return workload.base in self.bases


class Capacity:
    """Memory of all hosts of a view. It is changed by `add` and `remove`."""

    def __init__(self, view: View) -> None:
        self.sizes: Mapping[str, int] = costs.image_sizes(view.images, view.workloads)
        self.rooms = {host.name: Room(host) for host in view.hosts}
        for workload in view.workloads:
            if workload.host in self.rooms:
                self.add(workload, workload.host)
        self._add_open_moves(view)

    def _add_open_moves(self, view: View) -> None:
        """Count workloads with an open move at its destination as well."""
        known = {workload.name: workload for workload in view.workloads} if view.operations else {}
        for operation in view.operations:
            workload = known.get(operation.workload)
            for name in {operation.host, operation.destination}:
                if operation.verb == "move" and workload is not None and name in self.rooms:
                    self.stage(workload, name)
                    self.add(workload, name)

    def need(self, workload: Workload, name: str) -> int:
        """Return the memory that the workload would add to a host, including its base, bytes."""
        room = self.rooms[name]
        shares = room.shares(workload)
        memory = costs.occupied(workload, shares, self.sizes)
        if shares and workload.base is not None and workload.base not in room.bases:
            memory += self.sizes[workload.base]
        return memory

    def add(self, workload: Workload, name: str) -> None:
        """Count a workload on a host. Does nothing if it is counted there."""
        room = self.rooms[name]
        if workload.name in room.users:
            return
        # A clone on its host shares its base even if no image was reported.
        shares = workload.base is not None and (workload.host == name or room.shares(workload))
        room.used += costs.occupied(workload, shares, self.sizes)
        room.users[workload.name] = (workload, shares)
        if shares and workload.base is not None:
            if workload.base not in room.bases:
                room.used += self.sizes[workload.base]
            room.bases[workload.base] = room.bases.get(workload.base, 0) + 1
        if workload.group is not None:
            room.groups[workload.group] = room.groups.get(workload.group, 0) + 1

    def remove(self, workload: Workload, name: str) -> None:
        """Stop counting a workload on a host. Does nothing if it is not counted there."""
        room = self.rooms[name]
        if workload.name not in room.users:
            return
        counted, shares = room.users.pop(workload.name)
        room.used -= costs.occupied(counted, shares, self.sizes)
        if shares and counted.base is not None:
            _take_one(room.bases, counted.base)
            if counted.base not in room.bases:
                room.used -= self.sizes[counted.base]
        if counted.group is not None:
            _take_one(room.groups, counted.group)

    def refusal(self, workload: Workload, name: str, *, moving: int = 1) -> str | None:
        """Return the reason why a host cannot take a workload; None if it can.

        `moving`: number of moves to the host at the same time, each of which may need additional memory.
        """
        room = self.rooms[name]
        if not room.host.reachable:
            return "its agent does not reply"
        if room.host.draining:
            return "it is draining"
        if workload.group is not None and workload.group in room.groups and workload.name not in room.users:
            return f"it runs another workload of the group {workload.group}"
        extra = moving * max(room.staged, costs.staging(workload, room.shares(workload)))
        need = self.need(workload, name)
        if need + extra > room.free:
            return f"it lacks {need + extra - room.free} bytes of memory"
        return None

    def stage(self, workload: Workload, name: str) -> None:
        """Record that a move of the workload to the host is planned."""
        room = self.rooms[name]
        room.staged = max(room.staged, costs.staging(workload, room.shares(workload)))


def _take_one(counts: dict[str, int], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
