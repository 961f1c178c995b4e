"""State of one workload while a plan is carried out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pageferry.fleet.admission import Grant, Request
from pageferry.fleet.model import Move, Workload
from pageferry.fleet.steps import Cause

State = Literal["waiting", "moving", "asking", "recovering", "searching", "stuck", "done", "given-up"]
"""State of a task.

`waiting`: not started, or to be started again. `moving`: `StartMove` was emitted. `asking`: the outcome is unknown, and
the source was asked what it runs. `recovering`: the source recovers the move. `searching`: the source does not have the
workload, and the destination was asked. `stuck`: the outcome is unknown, and an operator must act. `done`: the
destination owns the workload. `given-up`: the source owns it, and it is not moved.
"""

UNRESOLVED: frozenset[State] = frozenset({"asking", "recovering", "searching", "stuck"})
"""States in which the owner is unknown. The workload counts on both hosts, and is not started."""
ENDED: frozenset[State] = frozenset({"stuck", "done", "given-up"})
"""States in which the execution does nothing for the workload by itself."""


@dataclass(slots=True)
class Task:
    """Workload that a plan moves."""

    workload: Workload
    move: Move
    """Current move; a retry replaces it."""
    priority: int
    state: State = "waiting"
    attempt: int = 0
    """Number of the current or last start; 0 before the first one."""
    starts: int = 0
    """Number of starts in this execution."""
    owner: str | None = None
    """Host that owns the workload; None if unknown. While the workload is moved, this is the source until the end of
    the move is known."""
    migration: str | None = None
    request: Request | None = None
    """Request while it waits for admission."""
    grant: Grant | None = None
    """Admission of the current start; None if its resources were released."""
    staged: int = 0
    """Additional memory that is reserved at the destination, bytes."""
    heard: float = 0.0
    """Time of the last event or question about the current start."""
    not_before: float = 0.0
    """Time before which a retry does not start."""
    doubted: float = 0.0
    """Time at which the outcome became unknown, or at which the source last reported that the move still runs."""
    refused: set[str] = field(default_factory=set)
    """Destinations that failed."""
    reason: str = ""
    """Message of the last failure."""
    cause: Cause = "connection-lost"
    """Cause of the failure of the current start if the source owns the workload."""
    remedy: str = ""
    """Instruction for an operator; empty if nothing is to be done."""

    @property
    def name(self) -> str:
        """Name of the workload."""
        return self.workload.name

    @property
    def unresolved(self) -> bool:
        """Whether the owner is unknown."""
        return self.state in UNRESOLVED
