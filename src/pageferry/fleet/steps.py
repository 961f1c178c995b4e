"""Events and actions of the state machine that carries out a plan (`execution`).

The driver passes an event for everything that it observes, and performs every action that it gets. It may pass an event
late, twice or not at all: `attempt` identifies the start to which an event belongs. The driver never decides about
ownership. If it does not know how a move has ended, it passes `Ended` with the outcome `unknown`.
"""

from __future__ import annotations

from typing import Literal

from pageferry.fleet.model import Host, Move, Operation, Outcome, Record, Workload

Cause = Literal[
    "full", "refused", "connection-lost", "not-converging", "unsupported", "workload-died", "cancelled", "other"
]
"""Cause of an aborted move. `full`: the destination has too little memory. `refused`: it has rejected the move for
another reason (PeerRefused). `unsupported`: the workload cannot be moved in this way to any host (UnsupportedError,
UsageError). `workload-died`: WorkloadDied."""
Owner = Literal["source", "destination", "unknown", "absent"]
"""Result of a recovery. `source`, `destination`: as `pageferry.recover` returns it; `source` also if no migration was
pending recovery. `unknown`: OutcomeUnknown, PostcopyPaused, or the host does not reply. `absent`: the source has no
workload of this name (NoSuchWorkload)."""


# -- events


class StepEvent(Record, frozen=True, kw_only=True, tag_field="type"):
    """Base of the events."""


class Begun(StepEvent, frozen=True, kw_only=True, tag="begun"):
    """The source has started the move."""

    workload: str
    attempt: int
    migration: str | None = None
    """Number of the migration; None if unknown."""


class Progressed(StepEvent, frozen=True, kw_only=True, tag="progressed"):
    """Progress of a move."""

    workload: str
    attempt: int
    fraction: float
    """0 to 1."""


class Ended(StepEvent, frozen=True, kw_only=True, tag="ended"):
    """End of a move. `unknown` is the outcome if the source reports it (OutcomeUnknown, PostcopyPaused), or if the
    driver has lost its call to the source."""

    workload: str
    attempt: int
    outcome: Outcome
    cause: Cause = "other"
    """Cause of `aborted`. With `unknown`, `cancelled` means that the move was cancelled; it is not started again if the
    source owns the workload."""
    reason: str = ""
    """Message of the error."""


class Recovered(StepEvent, frozen=True, kw_only=True, tag="recovered"):
    """Result of a recovery (`Recover`)."""

    workload: str
    attempt: int
    owner: Owner
    reason: str = ""
    """Message of the error."""


class Reported(StepEvent, frozen=True, kw_only=True, tag="reported"):
    """State of a host, as it is in the host's own registry. The driver passes it in reply to `AskHost`, when an agent
    has started again, and whenever it has a newer state."""

    host: Host
    workloads: tuple[Workload, ...] = ()
    """All workloads of the host."""
    operations: tuple[Operation, ...] = ()
    """Operations that run on the host at this time."""


class HostLost(StepEvent, frozen=True, kw_only=True, tag="host-lost"):
    """The agent of a host does not reply: the agent was killed, or the host is down or not reachable. Which of these
    is unknown, so the workloads of the host may run."""

    host: str
    reason: str = ""


class HeadRestarted(StepEvent, frozen=True, kw_only=True, tag="head-restarted"):
    """The driver has lost all calls to agents, such as after a restart of the head of the cluster."""


class CancelRequested(StepEvent, frozen=True, kw_only=True, tag="cancel-requested"):
    """A user cancels the execution. Moves that run are cancelled; others are not started."""


class Ticked(StepEvent, frozen=True, kw_only=True, tag="ticked"):
    """Time has passed. The driver passes it at `Execution.wake_at`."""


# -- actions


class Action(Record, frozen=True, kw_only=True, tag_field="type"):
    """Base of the actions."""


class StartMove(Action, frozen=True, kw_only=True, tag="start-move"):
    """Start a move at its source. The reply is `Begun`, later `Ended`."""

    move: Move
    attempt: int
    """Number of this start of a move of the workload, from 1."""


class CancelMove(Action, frozen=True, kw_only=True, tag="cancel-move"):
    """Cancel a move at its source. The reply is `Ended`: a move after its commit is not cancelled."""

    workload: str
    source: str
    attempt: int


class Recover(Action, frozen=True, kw_only=True, tag="recover"):
    """Run `pageferry.recover` at the source, with a receiver at the destination that replies. The reply is
    `Recovered`.

    Before the recovery, the agent ensures that it rejects every later `StartMove` of the workload with this or a lower
    `attempt`: it may have been delayed on the way to the agent. If the move still runs, the reply is `unknown`.
    """

    workload: str
    source: str
    destination: str
    attempt: int
    migration: str | None = None


class AskHost(Action, frozen=True, kw_only=True, tag="ask-host"):
    """Request the state of a host. The reply is `Reported`, or `HostLost`."""

    host: str


class GiveUp(Action, frozen=True, kw_only=True, tag="give-up"):
    """Report that a workload is not moved, and what an operator must do."""

    workload: str
    reason: str
    remedy: str
