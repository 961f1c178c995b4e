"""Requests to a host's agent, and its replies.

A request and a reply are bytes of JSON, so that agents and drivers of different versions understand each other: unknown
fields are ignored, and new fields have defaults. Ray transports them, and never transports memory. An operation has an
identifier, which the driver chooses. A repeated request with the same identifier starts nothing, and returns the state
of the operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from pageferry import errors
from pageferry.errors import FleetError, PageferryError
from pageferry.fleet.model import Host, Image, Mode, Record, Verb, Workload

R = TypeVar("R")

Kind = Literal["receive", "migrate", "checkpoint", "clone", "run"]
"""Kind of an operation of a host: the verb that its process runs."""
RECEIVE: Kind = "receive"
MIGRATE: Kind = "migrate"
CHECKPOINT: Kind = "checkpoint"
CLONE: Kind = "clone"
RUN: Kind = "run"
State = Literal["running", "ended", "lost"]
"""State of an operation. `lost`: its process was killed, or the host was restarted, before it reported a result."""


class Moved(Record, frozen=True, kw_only=True):
    """Workload to be received: what the destination must know before the source connects."""

    name: str
    kind: Literal["qemu", "demo"]
    command: tuple[str, ...] = ()
    """Command line of QEMU, program first. `{host}` stands for the name of the host."""
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    group: str | None = None


class OperationReport(Record, frozen=True, kw_only=True):
    """State of an operation of a host."""

    id: str
    kind: Kind
    workload: str
    peer: str | None = None
    """Name of the other host of a move."""
    state: State
    exit_code: int | None = None
    """Exit code of the process (docs/exit-codes.md); None while it runs, and if it was lost."""
    message: str = ""
    """Error of the process; empty if it has reported none."""
    address: str | None = None
    """Address on which a receiver listens."""
    received: bool = False
    """Whether a receiver has reported that the workload runs on this host."""
    fraction: float | None = None
    """Progress, 0 to 1; None if unknown."""
    started: float = 0.0
    """Start, seconds since 1970."""
    result: dict[str, Any] | None = None
    """Last event of the process, if it is a result."""

    @property
    def resumes(self) -> bool:
        """Whether it receives the missing pages of a workload that runs on this host (post-copy). Its source connects
        by a recovery, so that it has no peer."""
        return self.kind == RECEIVE and self.peer is None


class HostReport(Record, frozen=True, kw_only=True):
    """State of a host, read from its own registry."""

    host: Host
    address: str
    """Address on which receivers listen, without a port."""
    workloads: tuple[Workload, ...] = ()
    images: tuple[Image, ...] = ()
    operations: tuple[OperationReport, ...] = ()
    """Operations that are running, and the last ones that have ended, oldest first."""
    notes: tuple[str, ...] = ()
    """Conditions that an operator should know, such as priorities that workloads inherit."""


class Done(Record, frozen=True, kw_only=True):
    """Reply to a request without a result."""


class RecoveryReport(Record, frozen=True, kw_only=True):
    """Result of a recovery at the source."""

    owner: Literal["source", "destination"]


# -- requests


class Request(Record, frozen=True, kw_only=True, tag_field="do"):
    """Base of the requests."""


class Describe(Request, frozen=True, kw_only=True, tag="describe"):
    """Return a `HostReport`."""


class Prepare(Request, frozen=True, kw_only=True, tag="prepare"):
    """Return a `Moved` for a workload of this host. Fails if it cannot be moved."""

    workload: str


class Receive(Request, frozen=True, kw_only=True, tag="receive"):
    """Start a receiver for a workload, and return an `OperationReport` with its address."""

    id: str
    moved: Moved
    source: str
    """Name of the host that sends the workload. With TLS, only a certificate with this name is accepted."""


class Migrate(Request, frozen=True, kw_only=True, tag="migrate"):
    """Start the migration of a workload, and return an `OperationReport`."""

    id: str
    workload: str
    destination: str
    """Name of the host that receives the workload. With TLS, its certificate must have this name."""
    address: str
    mode: Mode = "precopy"
    bandwidth: int = 0
    """Limit, bytes per second; 0: no limit."""
    auto_converge: bool = False
    max_downtime: float | None = None
    """Seconds; None: the default of `pageferry migrate`."""


class Query(Request, frozen=True, kw_only=True, tag="query"):
    """Return the `OperationReport` of an operation when it has ended, or after `wait` seconds."""

    id: str
    wait: float = 0.0


class Cancel(Request, frozen=True, kw_only=True, tag="cancel"):
    """Send SIGINT to the process of an operation, and return its `OperationReport`. An operation that a running
    workload needs, such as a migration after its commit, gets no signal, and is reported as `running`."""

    id: str


class Recover(Request, frozen=True, kw_only=True, tag="recover"):
    """Resolve a migration of a workload whose outcome is unknown, and return a `RecoveryReport`."""

    workload: str


class Answer(Request, frozen=True, kw_only=True, tag="answer"):
    """Reply to requests for the outcome of migrations at an address of this host for `seconds` seconds, in the place of
    a receiver that has exited. Return a `Done`."""

    address: str
    seconds: float
    workload: str = ""
    resume: bool = False
    """Whether to receive the remaining pages of `workload`, which runs on this host (post-copy)."""


class Checkpoint(Request, frozen=True, kw_only=True, tag="checkpoint"):
    """Save a workload to a file or to a store, and return an `OperationReport`."""

    id: str
    workload: str
    target: str
    """URL in a store, or path on this host."""


class Clone(Request, frozen=True, kw_only=True, tag="clone"):
    """Start a clone of an image, and return an `OperationReport`."""

    id: str
    image: str
    """Identity (`ID:DIGEST`) of an image in a directory of this host, or URL of an image in a store, or path."""
    workload: str
    """Name of the clone."""
    number: int
    """Number of the clone, from 1, for the placeholder `{n}`."""
    command: tuple[str, ...]
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    group: str | None = None


class Run(Request, frozen=True, kw_only=True, tag="run"):
    """Start a guest, and return an `OperationReport`."""

    id: str
    moved: Moved


class Identify(Request, frozen=True, kw_only=True, tag="identify"):
    """Return the identity of an image, given by its path on this host or by its URL, as an `Image`."""

    image: str


AnyRequest = (
    Describe | Prepare | Receive | Migrate | Query | Cancel | Recover | Answer | Checkpoint | Clone | Run | Identify
)


class Failure(Record, frozen=True, kw_only=True):
    """Error of a request."""

    error: str
    """Name of the class in `pageferry.errors`."""
    message: str


class Reply(Record, frozen=True, kw_only=True):
    """Reply to a request: a result, or a failure."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    failure: Failure | None = None


def succeeded(result: msgspec.Struct) -> bytes:
    """Return the bytes of a reply with a result."""
    return msgspec.json.encode(Reply(result=msgspec.Raw(msgspec.json.encode(result))))


def failed(error: Exception) -> bytes:
    """Return the bytes of a reply for a request that has failed."""
    name = type(error).__name__ if isinstance(error, PageferryError) else FleetError.__name__
    message = str(error) if isinstance(error, PageferryError) else f"{type(error).__name__}: {error}"
    return msgspec.json.encode(Reply(failure=Failure(error=name, message=message)))


def decode(reply: bytes, kind: type[R], host: str) -> R:
    """Return the result of a reply of the agent of `host`. Raises the error of the agent, FleetError if the reply is
    invalid."""
    try:
        found = msgspec.json.decode(reply, type=Reply)
        if found.failure is None:
            return msgspec.json.decode(found.result, type=kind)
    except msgspec.MsgspecError as wrong:
        raise FleetError(
            f"cannot use the reply of {host}: {wrong}; use the same version of pageferry on all hosts"
        ) from wrong
    raise error_of(found.failure, host)


def error_of(failure: Failure, host: str) -> PageferryError:
    """Return the error that an agent has reported."""
    kind = getattr(errors, failure.error, FleetError)
    known = isinstance(kind, type) and issubclass(kind, PageferryError)
    return (kind if known else FleetError)(f"{host}: {failure.message}")


def verb_of(kind: Kind) -> Verb | None:
    """Return the verb of the fleet's view for a kind of operation; None for the receiving side of a move."""
    verbs: dict[str, Verb] = {MIGRATE: "move", CHECKPOINT: "checkpoint", CLONE: "clone", RUN: "clone"}
    return verbs.get(kind)
