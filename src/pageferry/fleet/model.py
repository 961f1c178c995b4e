"""Records of a fleet: hosts, workloads, links, images, and plans for them.

All records are immutable, and can be encoded as JSON by msgspec. Sizes are in bytes, rates in bytes per second, and
times in seconds. Names of hosts and of workloads are unique in the fleet. Images are identified by `ID:DIGEST`, as in
the detail `base` of the migration protocol (docs/protocol.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from pageferry.events import Event

Mode = Literal["precopy", "hybrid", "postcopy"]
"""Mode of a migration (`pageferry migrate --mode`)."""
Policy = Literal["spread", "pack"]
"""Placement of new clones: on the emptiest hosts, or on as few hosts as possible."""
Verb = Literal["move", "clone", "checkpoint"]
Status = Literal["running", "paused", "busy", "unknown"]
"""`paused`: by its user. `busy`: an operation that the fleet did not start uses the workload. `unknown`: the outcome of
a move is unknown, and only `pageferry migrate --recover` may resolve it."""
Outcome = Literal["done", "aborted", "unknown"]
"""Outcome of a move. `done`: the destination owns the workload. `aborted`: the source owns it, and it runs there.
`unknown`: no reply to the commit, or no report from the source; the hosts determine the owner by a recovery."""


class Record(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Base of the records of a fleet."""


class Image(Record, frozen=True, kw_only=True):
    """Image whose memory clones share."""

    identity: str
    """`ID:DIGEST`."""
    memory: int
    """Memory of a complete base of this image, bytes. A host needs it once for all of its clones."""
    name: str = ""
    """Path or URL, for messages."""


class Link(Record, frozen=True, kw_only=True):
    """Link that several hosts share, such as the uplink of a rack."""

    name: str
    rate: int
    """Bytes per second in each direction."""


class Host(Record, frozen=True, kw_only=True):
    """Host of a fleet, as its agent has reported it."""

    name: str
    memory: int
    """Memory for workloads and bases, bytes. It excludes memory of other programs of the host."""
    headroom: int = 0
    """Part of `memory` that no plan uses, bytes."""
    link: int = 125_000_000
    """Rate of the network interface in each direction, bytes per second."""
    cores: int = 1
    images: frozenset[str] = frozenset()
    """Images that a clone can share on this host: images in its directories, and those of `bases`."""
    bases: frozenset[str] = frozenset()
    """Images whose base is in memory."""
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Labels such as `rack`. `evacuate` can select hosts by them."""
    uplinks: tuple[str, ...] = ()
    """Names of the shared links between this host and the core of the network, from the rack upwards. A transfer
    between two hosts uses the links that only one of the two has."""
    draining: bool = False
    """Whether the host accepts no workloads."""
    reachable: bool = True
    """Whether its agent replies. A plan uses only reachable hosts."""


class Workload(Record, frozen=True, kw_only=True):
    """Workload of a fleet."""

    name: str
    host: str
    kind: str = "qemu"
    """Kind of the workload or VMM: `qemu`, `arena`, `process`, `firecracker`, `cloud-hypervisor`."""
    memory: int
    """Size of the memory, bytes."""
    private: int
    """Memory that this workload alone occupies, bytes: private pages of a clone, otherwise all present pages."""
    base: str | None = None
    """Image whose memory it shares; None if it shares none."""
    dirty_rate: int | None = None
    """Memory modified per second, bytes; None if it was not measured."""
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    group: str | None = None
    """Anti-affinity group: a host runs at most one workload of a group. None: no group."""
    status: Status = "running"
    cannot: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Operations that the workload does not support (`move`, `precopy`, `hybrid`, `postcopy`, `clone`, `checkpoint`),
    each with the reason."""


class Operation(Record, frozen=True, kw_only=True):
    """Operation that is running, or whose outcome is unknown."""

    verb: Verb
    workload: str
    host: str
    """Host that runs the operation: the source of a move."""
    destination: str | None = None
    """Destination of a move; None for other verbs."""
    migration: str | None = None
    """Number of the migration in the migration protocol; None if there is none, or it is not known yet."""
    outcome: Outcome | None = None
    """None while the operation is running."""
    fraction: float | None = None
    """Progress, 0 to 1; None if unknown."""


class View(Record, frozen=True, kw_only=True):
    """State of a fleet at one point in time, as reported by its hosts."""

    hosts: tuple[Host, ...]
    workloads: tuple[Workload, ...] = ()
    images: tuple[Image, ...] = ()
    """Images that `Host.images`, `Host.bases` and `Workload.base` refer to. For an image that is missing here, the
    size of the memory of its clone is assumed."""
    links: tuple[Link, ...] = ()
    operations: tuple[Operation, ...] = ()


class Demand(Record, frozen=True, kw_only=True):
    """Clones to start."""

    image: str
    """Identity of the image. Only hosts with this image are considered."""
    count: int
    policy: Policy = "spread"
    name: str = "clone-{n}"
    """Names of the clones; `{n}` is their number, from 1."""
    memory: int = 0
    """Size of the memory of each clone, bytes; 0: the memory of the image."""
    private: int | None = None
    """Expected private memory of each clone, bytes; None: estimated (`costs.PRIVATE_SHARE`)."""
    group: str | None = None
    """Anti-affinity group of the clones."""


class Limits(Record, frozen=True, kw_only=True):
    """Limits of the moves that run at the same time."""

    per_host: int = 2
    """Number of moves that a host sends or receives at the same time."""
    per_link: int = 1024
    """Number of moves over a shared link at the same time."""
    attempts: int = 3
    """Number of times that a move is started before an operator must decide."""
    host_timeout: float = 60.0
    """Time for which a host may be unreachable before moves that need it are given up, seconds."""
    link_share: float = 0.9
    """Part of each link that moves may use, greater than 0 and at most 1."""


class Move(Record, frozen=True, kw_only=True):
    """Planned move of a workload."""

    workload: str
    source: str
    destination: str
    mode: Mode
    bytes: int
    """Expected number of bytes to send."""
    seconds: float
    """Expected duration, seconds."""
    downtime: float
    """Expected downtime, seconds."""
    start: float = 0.0
    """Earliest start, seconds from the start of the plan."""
    rate: int = 0
    """Limit of the transfer (`pageferry migrate --bandwidth`), bytes per second. Set-up and pause send nothing, so that
    the average rate of the move, `bytes / seconds`, is lower. The average rates of a plan fit onto its links."""
    auto_converge: bool = False
    """Whether the workload is throttled if rounds do not converge, because it supports no other mode."""
    shares_base: bool = False
    """Whether the workload shares the memory of its image at the destination, so that only private pages are sent."""
    reason: str = ""
    """Reason for the destination and the mode."""


class Placed(Record, frozen=True, kw_only=True):
    """Planned start of a clone."""

    workload: str
    image: str
    host: str
    bytes: int
    """Memory that it adds to the host, bytes, including the base if it is the first clone there."""
    reason: str = ""


class Unplaced(Record, frozen=True, kw_only=True):
    """Workload for which the plan has no host, or that cannot be moved."""

    workload: str
    reason: str
    remedy: str
    """Instruction for an operator."""


class Peak(Record, frozen=True, kw_only=True):
    """Highest planned load of a link."""

    link: str
    """Name of a host or of a shared link, and the direction, such as `host-3 out`."""
    rate: int
    """Bytes per second."""
    capacity: int
    """Bytes per second."""


class Plan(Event, frozen=True, kw_only=True, tag="fleet-plan"):
    """Plan: what moves where, in which order and mode, and what has no place."""

    moves: tuple[Move, ...] = ()
    """Moves in the order of their start."""
    placed: tuple[Placed, ...] = ()
    """Clones to start."""
    unplaced: tuple[Unplaced, ...] = ()
    makespan: float = 0.0
    """Expected duration of all moves, seconds."""
    lower_bound: float = 0.0
    """Minimum duration of any plan for the same workloads, seconds: the largest quotient of the bytes that must cross a
    link and the rate of that link. It neglects set-up, downtime, and pages that are sent again."""
    bytes: int = 0
    """Sum of the bytes of all moves."""
    peaks: tuple[Peak, ...] = ()
    """Highest load of each link that the plan uses, most loaded first."""
    deadline: float | None = None
    """Requested maximum of `makespan`, seconds; None: no maximum."""
    deadline_note: str | None = None
    """Measures for the deadline, or the reason why it cannot be met; None without a deadline."""
    limits: Limits = msgspec.field(default_factory=Limits)

    @property
    def meets_deadline(self) -> bool:
        """Whether the expected duration is within the deadline, and every workload has a place."""
        return self.deadline is None or (self.makespan <= self.deadline and not self.unplaced)
