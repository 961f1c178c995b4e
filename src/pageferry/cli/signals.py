"""SIGINT and SIGTERM while a verb runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Self


class Interruption:
    """Turns the first SIGINT or SIGTERM into a cancellation, so that the verb can put things back before it ends.

    A coroutine started by `run` is cancelled as a task; ordinary code, and a coroutine that is asked a second time,
    get KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that came."""
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
        """Run a coroutine to its end. Raises asyncio.CancelledError when it let itself be cancelled."""
        return asyncio.run(self._supervised(coroutine))

    async def _supervised(self, coroutine: Coroutine[Any, Any, int]) -> int:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        # From a signal handler only this call is sure to wake the loop.
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
            # May be lost where the interpreter ignores exceptions (finalizers): the cancellation is not.
            raise KeyboardInterrupt
