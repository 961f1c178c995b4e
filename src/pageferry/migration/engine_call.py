"""Engine calls from coroutines: run in a thread, cancellable, with engine errors translated to pageferry errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pageferry._engine import TlsError
from pageferry.errors import (
    AuthenticationError,
    Cancelled,
    ConnectionLost,
    MigrationError,
    ProtocolError,
    WorkloadDied,
    WorkloadError,
)
from pageferry.host.blocking import ignoring_cancellation, on_thread

T = TypeVar("T")

GRACE = 0.6
"""Maximum time for the cleanup after a cancellation, seconds. It lets a command exit within a second of a signal."""


async def off_loop(call: Callable[[], T], cancel: Callable[[], None] | None = None) -> T:
    """Run a blocking engine call in a thread, as `on_thread` does.

    Raises ConnectionLost, ProtocolError, AuthenticationError, Cancelled, WorkloadDied or WorkloadError for the errors
    of the engine.
    """
    try:
        return await on_thread(call, cancel)
    except (OSError, ValueError) as error:
        raise translate(error) from error


async def within_grace(work: Coroutine[Any, Any, object], error: BaseException) -> bool:
    """Run `work`, which cleans up after `error`. If `error` is a cancellation, wait for at most GRACE seconds. Return
    whether `work` has completed.

    A workload that does not respond is cleaned up when this process exits: the guardian resumes a guest, and the kernel
    removes the write traces.
    """
    if not isinstance(error, asyncio.CancelledError):
        await ignoring_cancellation(work)
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
    """Return the pageferry error for an error of the engine."""
    match error:
        case InterruptedError():
            return Cancelled("cancelled")
        case ConnectionError() | TimeoutError():
            # An errno marks an error of the kernel, whose text does not name the connection.
            what = f"the page stream failed: {error.strerror}" if error.errno else str(error)
            return ConnectionLost(what)
        case TlsError():
            return AuthenticationError(str(error))
        case ProcessLookupError():
            return WorkloadDied(str(error))
        case ValueError():
            return ProtocolError(str(error))
        case _:
            return WorkloadError(str(error))
