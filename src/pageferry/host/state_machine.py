"""State machine with checked transitions: an operation in the wrong order is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Generic, TypeVar

S = TypeVar("S", bound=StrEnum)


class WrongState(RuntimeError):
    """An operation was called in the wrong order."""


class StateMachine(Generic[S]):
    """State of an operation. `transitions`: states that may follow each state. A state without an entry is final.

    `what`: name of the operation, for error messages.
    """

    def __init__(self, what: str, initial: S, transitions: Mapping[S, Collection[S]]) -> None:
        self._what = what
        self._state = initial
        self._transitions = transitions

    @property
    def state(self) -> S:
        """Current state."""
        return self._state

    def enter(self, state: S) -> None:
        """Change to a state that may follow the current one. Raises WrongState for any other state."""
        if state not in self._transitions.get(self._state, ()):
            raise WrongState(f"{self._what} is in state '{self._state}', and cannot change to '{state}'")
        self._state = state

    def is_in(self, *states: S) -> bool:
        """Return whether the current state is one of `states`."""
        return self._state in states
