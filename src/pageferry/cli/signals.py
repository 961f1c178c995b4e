"""Handling of SIGINT and SIGTERM while a verb runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Self


class Interruption:
    """Context in which the first SIGINT or SIGTERM becomes a cancellation, so that the verb can undo its changes.

    A coroutine started by `run` is cancelled as a task. Synchronous code, and a coroutine at the second signal, receive
    KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """First signal received, or None."""
        self._cancel: Callable[[], object] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, coroutine: Coroutine[Any, Any, int]) -> int:
        """Run a coroutine and return its result. Raises asyncio.CancelledError if a signal has cancelled it."""
        return asyncio.run(self._supervised(coroutine))

    async def _supervised(self, coroutine: Coroutine[Any, Any, int]) -> int:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        # Only this call is guaranteed to wake the loop from a signal handler.
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            return await coroutine
        finally:
            self._cancel = None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        first = self.received is None
        if first:
            self.received = signal.Signals(number)
        if self._cancel is not None:
            self._cancel()
        if not first or self._cancel is None:
            # The interpreter may discard this exception (in finalizers), but not the cancellation.
            raise KeyboardInterrupt
