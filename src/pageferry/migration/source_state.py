"""States of a migration at the source, and their order."""

from __future__ import annotations

from enum import StrEnum

from pageferry.host.state_machine import StateMachine


class SourceState(StrEnum):
    """State of a migration at the source."""

    NEW = "new"
    SETUP = "setup"
    """The source connects, and installs the write traces."""
    COPYING = "copying"
    """Pages are sent in rounds while the workload runs."""
    SWITCHING_OVER = "switching over"
    """The workload is paused, or is being prepared for the pause."""
    READY = "ready"
    """The destination is ready, and the source records the commit."""
    COMMITTED = "committed"
    """The source does not run the workload on its own: the destination may own it."""
    REFUSED = "refused"
    """The destination has decided not to run the workload: the source owns it."""
    MOVED = "moved"
    """The workload runs at the destination."""
    COMPLETED = "completed"
    FAILED = "failed"
    """The migration has failed or was cancelled, and the source owns the workload."""


_FOLLOWS = {
    SourceState.NEW: {SourceState.SETUP},
    SourceState.SETUP: {SourceState.COPYING, SourceState.FAILED},
    SourceState.COPYING: {SourceState.SWITCHING_OVER, SourceState.FAILED},
    SourceState.SWITCHING_OVER: {SourceState.READY, SourceState.FAILED},
    SourceState.READY: {SourceState.COMMITTED, SourceState.FAILED},
    SourceState.COMMITTED: {SourceState.MOVED, SourceState.REFUSED},
    SourceState.REFUSED: {SourceState.FAILED},
    SourceState.MOVED: {SourceState.COMPLETED},
}


def source_states(name: str) -> StateMachine[SourceState]:
    """Return the state machine for a migration of the workload `name`."""
    return StateMachine(f"the migration of {name}", SourceState.NEW, _FOLLOWS)
