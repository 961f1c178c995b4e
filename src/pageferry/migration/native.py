"""Calls into the engine from coroutines: on a thread, cancellable, with its errors as ours."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pageferry.errors import (
    AuthenticationError,
    Cancelled,
    ConnectionLost,
    MigrationError,
    ProtocolError,
    WorkloadDied,
    WorkloadError,
)
from pageferry.host.blocking import on_thread

T = TypeVar("T")

GRACE = 0.6
"""Seconds for cleaning up after a cancellation: a command ends within a second of a signal."""

Counters = tuple[int, int, int, int, int]
"""(bytes on the wire, storage blocks, data pages, zero pages, absent pages) of a page stream so far."""


async def off_loop(call: Callable[[], T], cancel: Callable[[], None] | None = None) -> T:
    """Run a blocking call as `on_thread` does.

    Raises ConnectionLost, ProtocolError, AuthenticationError, Cancelled, WorkloadDied, WorkloadError for what the
    engine raises.
    """
    try:
        return await on_thread(call, cancel)
    except (OSError, ValueError) as error:
        raise translate(error) from error


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which nobody can cut short: whoever cancels us meanwhile has to wait for it.

    The cancellation is forgotten then: what `work` did cannot be undone, and its result says so.
    """
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task,))
    return task.result()


async def within_grace(work: Coroutine[Any, Any, object], error: BaseException) -> bool:
    """Clean up after an error. After a cancellation wait for at most GRACE seconds; return False if that was too short.

    A workload that does not answer is left to what happens when this process ends: a guardian lets a guest run on, and
    the kernel takes the traces away.
    """
    if not isinstance(error, asyncio.CancelledError):
        await to_the_end(work)
        return True
    task = asyncio.ensure_future(work)
    deadline = asyncio.get_running_loop().time() + GRACE
    while not task.done() and (left := deadline - asyncio.get_running_loop().time()) > 0:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task,), timeout=left)
    if task.done():
        task.result()
        return True
    task.cancel()
    return False


def translate(error: OSError | ValueError) -> MigrationError | WorkloadError:
    """The error of ours that an error of the engine stands for."""
    match error:
        case InterruptedError():
            return Cancelled("cancelled")
        case ConnectionError() | TimeoutError():
            # With a number it is the kernel's, which does not say what it is about.
            what = f"the page stream broke: {error.strerror}" if error.errno else str(error)
            return ConnectionLost(what)
        case PermissionError() if error.errno is None:
            return AuthenticationError(str(error))
        case ProcessLookupError():
            return WorkloadDied(str(error))
        case ValueError():
            return ProtocolError(str(error))
        case _:
            return WorkloadError(str(error))
