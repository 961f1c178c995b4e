"""Links of a fleet: paths between hosts, and the parts of links that running moves use.

Each link has two directions, which do not share their rate. A path consists of the interface of the source, the shared
links that only one of the two hosts has, and the interface of the destination.
"""

from __future__ import annotations

from typing import NamedTuple

from pageferry.fleet.model import Host, Limits, Peak, View

PARALLEL_UPLINK = 2
"""Minimum number of waiting moves among which a shared link is divided."""
ENOUGH = 0.5
"""Part of the wanted rate that a move accepts instead of waiting for more."""


class Path(NamedTuple):
    """Path of a move: directions of links, by number."""

    directions: tuple[int, ...]
    rate: float
    """Rate of the slowest link, bytes per second, without the part that moves may not use."""


class Network:
    """Links of a view, and the rates that are reserved on them. Numbers of directions are even for traffic out of hosts
    and racks, odd for traffic into them."""

    def __init__(self, view: View, limits: Limits) -> None:
        self.limits = limits
        self.hosts = {host.name: host for host in view.hosts}
        self._first = {host.name: 2 * number for number, host in enumerate(view.hosts)}
        self._shared = {link.name: 2 * (len(view.hosts) + number) for number, link in enumerate(view.links)}
        rates = [host.link for host in view.hosts] + [link.rate for link in view.links]
        self.capacity = [rate * limits.link_share for rate in rates for _ in range(2)]
        """Rate that moves may use, for each direction, bytes per second."""
        self.reserved = [0.0] * len(self.capacity)
        self.moves = [0] * len(self.capacity)
        """Number of moves on each direction."""
        self.peak = [0.0] * len(self.capacity)
        self._names = [host.name for host in view.hosts] + [link.name for link in view.links]
        self._hosts = 2 * len(view.hosts)

    def path(self, source: str, destination: str) -> Path:
        """Return the path from one host to another."""
        up, down = self.hosts[source], self.hosts[destination]
        directions = (
            self._first[source],
            *(self._shared[name] for name in up.uplinks if name in self._shared and name not in down.uplinks),
            *(self._shared[name] + 1 for name in down.uplinks if name in self._shared and name not in up.uplinks),
            self._first[destination] + 1,
        )
        return Path(directions, min(self.capacity[direction] for direction in directions))

    def is_shared(self, direction: int) -> bool:
        """Return whether several hosts share the link."""
        return direction >= self._hosts

    def out_of(self, host: str) -> int:
        """Return the direction out of a host."""
        return self._first[host]

    def into(self, host: str) -> int:
        """Return the direction into a host."""
        return self._first[host] + 1

    def free(self, direction: int) -> float:
        """Return the rate that is not reserved, bytes per second."""
        return self.capacity[direction] - self.reserved[direction]

    def reserve(self, path: Path, rate: float) -> None:
        """Reserve a rate on all links of a path."""
        for direction in path.directions:
            self.reserved[direction] += rate
            self.moves[direction] += 1
            self.peak[direction] = max(self.peak[direction], self.reserved[direction])

    def release(self, path: Path, rate: float) -> None:
        """Release a reserved rate."""
        for direction in path.directions:
            self.moves[direction] -= 1
            self.reserved[direction] = self.reserved[direction] - rate if self.moves[direction] else 0.0

    def peaks(self) -> tuple[Peak, ...]:
        """Return the highest reserved rate of each link that was used, the most loaded first."""
        used = [number for number, rate in enumerate(self.peak) if rate]
        used.sort(key=lambda number: (-self.peak[number] / self.capacity[number], number))
        return tuple(
            Peak(
                link=self.name(number),
                rate=round(self.peak[number]),
                capacity=round(self.capacity[number] / self.limits.link_share),
            )
            for number in used
        )

    def name(self, direction: int) -> str:
        """Return the name of a direction, for reports."""
        return f"{self._names[direction // 2]} {'in' if direction % 2 else 'out'}"

    def host_of(self, direction: int) -> Host | None:
        """Return the host to whose interface a direction belongs; None for a shared link."""
        return None if self.is_shared(direction) else self.hosts[self._names[direction // 2]]
