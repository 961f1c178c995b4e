"""Actions of this program before fork(2), the number of its forks, and locks for programs that fork.

A child has neither the pager threads nor the traces of its parent: before a fork, contents must be loaded and traces
removed. The start of another program (subprocess, posix_spawn) is not a fork in this sense, and runs no actions.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_actions: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()
_count = 0


def before_fork(owner: T, action: Callable[[T], object]) -> None:
    """Call `action(owner)` before every fork, while `owner` exists and until `forget` is called. A later action of the
    owner replaces it.

    `action` must not refer to the owner, because the reference would keep the owner alive.
    """
    _actions[owner] = action


def forget(owner: object) -> None:
    """Remove the action of an owner, if it has one."""
    _actions.pop(owner, None)


def count() -> int:
    """Return the number of forks of this program so far."""
    return _count


class Lock:
    """Lock that is free in a child of fork(2), even if a thread of the parent holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def acquire(self, timeout: float = -1) -> bool:
        """Acquire the lock, as `threading.Lock.acquire` does."""
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def renew(self) -> None:
        """Replace the lock, in the child."""
        self._lock = threading.Lock()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_locks):
        lock.renew()


def _before_fork() -> None:
    """Run all actions, even if one of them fails. Python prints the error, and the program forks in any case."""
    global _count
    _count += 1
    failures: list[Exception] = []
    for owner, action in list(_actions.items()):
        try:
            action(owner)
        except Exception as error:
            failures.append(error)
    if failures:
        raise ExceptionGroup("cannot prepare for a fork", failures)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
