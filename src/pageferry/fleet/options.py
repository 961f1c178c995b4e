"""Options of the operations on fleets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from pageferry.errors import UsageError
from pageferry.fleet.model import Policy
from pageferry.host.registry import check_name
from pageferry.migration.options import TIMEOUT
from pageferry.options import Count, Duration, PathName, Rate, Size, Text, Texts, check

MAX_SIZE = 1 << 50


class ClusterArguments(TypedDict, total=False):
    """Keyword arguments for the fields of `ClusterOptions`."""

    address: str | None
    insecure: bool


class MovableArguments(ClusterArguments, total=False):
    """Keyword arguments for the fields of `MovableOptions`."""

    host: str | None
    tls: str | os.PathLike[str] | None


class MoveArguments(ClusterArguments, total=False):
    """Keyword arguments for the fields of `MoveOptions`."""

    dry_run: bool


class EvacuateArguments(MoveArguments, total=False):
    """Keyword arguments for the fields of `EvacuateOptions`."""

    deadline: float | str | None
    per_host: int


class RebalanceArguments(MoveArguments, total=False):
    """Keyword arguments for the fields of `RebalanceOptions`."""

    per_host: int


class CloneArguments(MoveArguments, total=False):
    """Keyword arguments for the fields of `CloneOptions`."""

    count: int
    policy: Policy
    name: str
    group: str | None
    labels: Sequence[str]


class CheckpointArguments(ClusterArguments, total=False):
    """Keyword arguments for the fields of `CheckpointOptions`."""

    per_host: int


class RunArguments(ClusterArguments, total=False):
    """Keyword arguments for the fields of `RunOptions`."""

    host: str | None
    group: str | None
    labels: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Options of a connection to a cluster. Raises UsageError."""

    address: Annotated[str | None, Text(metavar="HOST:PORT", unset="RAY_ADDRESS, or 127.0.0.1:6379"), "cluster"] = None
    """Address of the head of the Ray cluster."""
    insecure: Annotated[bool, "cluster"] = False
    """Use a cluster that accepts clients without a token, or whose connections are not encrypted."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class MovableOptions(ClusterOptions):
    """Options of a movable actor."""

    host: str | None = None
    """Host of the fleet, or id of a node of Ray; None: this node."""
    tls: Path | None = None
    """Directory of certificates on every node (docs/tls.md)."""


@dataclass(frozen=True, kw_only=True)
class JoinOptions(ClusterOptions):
    """Options of `pageferry fleet join`. Raises UsageError."""

    name: Annotated[str | None, Text(metavar="HOST", unset="the host name")] = None
    """Name of this host in the fleet, which its certificate must contain."""
    listen: Annotated[str | None, Text(metavar="ADDRESS", unset="the address that the cluster knows")] = None
    """Address of this host, without a port, on which it receives workloads."""
    tls: Annotated[Path | None, PathName(metavar="DIR")] = None
    """Directory with the certificates of this host as a source and as a receiver (docs/tls.md); without it, only
    `insecure` allows other addresses than loopback."""
    images: Annotated[tuple[str, ...], Texts(metavar="DIR")] = ()
    """Directory of images whose memory clones may share on this host; can be repeated."""
    labels: Annotated[tuple[str, ...], Texts(metavar="KEY=VALUE")] = ()
    """Label of this host, such as rack=r7; can be repeated."""
    link: Annotated[int, Rate()] = 125_000_000
    """Rate of the network interface in each direction, bytes per second."""
    memory: Annotated[int | None, Size(1, MAX_SIZE, unset="the available memory, and that of its workloads")] = None
    """Memory of this host for workloads."""
    headroom: Annotated[int, Size(0, MAX_SIZE)] = 0
    """Memory that no plan uses."""
    timeout: Annotated[float, TIMEOUT] = 30.0
    """Seconds of silence after which the peer of a migration counts as lost."""

    def __post_init__(self) -> None:
        check(self)
        parse_labels(self.labels)
        if self.name is not None:
            check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class MoveOptions(ClusterOptions):
    """Options of a move."""

    dry_run: bool = False
    """Print the plan, and change nothing."""


@dataclass(frozen=True, kw_only=True)
class EvacuateOptions(MoveOptions):
    """Options of an evacuation."""

    deadline: Annotated[float | None, Duration(1.0, 1e7)] = None
    """Maximum duration of the plan; faster modes are chosen where needed."""
    per_host: Annotated[int, Count(1, 64)] = 2
    """Number of moves that a host sends or receives at the same time."""


@dataclass(frozen=True, kw_only=True)
class RebalanceOptions(MoveOptions):
    """Options of a levelling of the memory use."""

    per_host: Annotated[int, Count(1, 64)] = 2
    """Number of moves that a host sends or receives at the same time."""


@dataclass(frozen=True, kw_only=True)
class CloneOptions(MoveOptions):
    """Options of new clones."""

    count: Annotated[int, Count(1, 100_000)] = 1
    """Number of clones."""
    policy: Policy = "spread"
    """Hosts of the clones: the emptiest ones (spread), or as few as possible (pack)."""
    name: str = "clone-{n}"
    """Name of each clone; {n} stands for its number, from 1 on."""
    group: Annotated[str | None, Text(metavar="NAME")] = None
    """Anti-affinity group: no host runs two workloads of a group."""
    labels: Annotated[tuple[str, ...], Texts(metavar="KEY=VALUE")] = ()
    """Label of the clones; can be repeated."""

    def __post_init__(self) -> None:
        check(self)
        parse_labels(self.labels)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(ClusterOptions):
    """Options of checkpoints."""

    per_host: Annotated[int, Count(1, 64)] = 1
    """Number of checkpoints that a host writes at the same time."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(ClusterOptions):
    """Options of a new guest."""

    host: Annotated[str | None, Text(metavar="HOST", unset="the host with the most free memory")] = None
    """Host of the guest."""
    group: Annotated[str | None, Text(metavar="NAME")] = None
    """Anti-affinity group: no host runs two workloads of a group."""
    labels: Annotated[tuple[str, ...], Texts(metavar="KEY=VALUE")] = ()
    """Label of the guest; can be repeated."""

    def __post_init__(self) -> None:
        check(self)
        parse_labels(self.labels)


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Return labels from texts such as `rack=r7`. Raises UsageError."""
    found = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not key or not separator:
            raise UsageError(f"invalid label {text!r}: expected KEY=VALUE")
        found[key] = value
    return found
