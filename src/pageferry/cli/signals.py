"""Handling of SIGINT and SIGTERM while a verb runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Self


class Interruption:
    """Context in which the first SIGINT or SIGTERM cancels the verb, so that it can undo its changes.

    The first signal cancels the task of a coroutine that `run` executes. At the second signal, its event loop raises
    KeyboardInterrupt. At the third signal, KeyboardInterrupt is raised at the current point of the coroutine.
    Synchronous code receives KeyboardInterrupt at every signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """First signal received, or None."""
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
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
        self._loop = loop = asyncio.get_running_loop()
        # Among the calls that a signal handler can make, only this one is guaranteed to wake the loop.
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            with _woken_by_signals(loop):
                return await coroutine
        finally:
            self._cancel = None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self.received is None:
            self.received = signal.Signals(number)
        if self._loop is None or self._loop.is_closed() or self._count > 2:
            # The interpreter discards an exception that is raised in a finalizer. With an event loop, the task is
            # therefore cancelled first, and this exception is raised only from the third signal on.
            raise KeyboardInterrupt
        if self._cancel is not None:
            self._cancel()
            if self._count == 2:
                # If the exception were raised here, it could interrupt the loop between two steps and discard a
                # callback. The task that needs this callback would then wait forever.
                self._loop.call_soon_threadsafe(_interrupt)


@contextlib.contextmanager
def _woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Wake the loop at every signal during the block.

    The interpreter calls a handler in the main thread, between two instructions. A signal that another thread receives,
    or that arrives just before the loop waits, would otherwise be handled only when the loop is woken by an event.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        for end in (reader, writer):
            end.setblocking(False)
        loop.add_reader(reader, reader.recv, 4096)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            loop.remove_reader(reader)


def _interrupt() -> None:
    raise KeyboardInterrupt
