"""Blocking calls from coroutines, and operations on a separate event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, copy_context
from typing import Any, Generic, ParamSpec, TypeVar

from pageferry.errors import UsageError
from pageferry.host import tracebacks
from pageferry.host.workers import Workers

T = TypeVar("T")
P = ParamSpec("P")

Work = Callable[[Callable[[Any], object]], Coroutine[Any, Any, T]]
"""Factory of the coroutine of an operation; the argument is the listener for the events of the operation."""

CALLER: ContextVar[asyncio.AbstractEventLoop | None] = ContextVar("caller", default=None)
"""Event loop of the program that awaits an operation run by `beside_loop`; None outside of such an operation."""


def program_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that awaits a `beside_loop` operation, otherwise the running event loop.

    Return None if there is neither.
    """
    if (caller := CALLER.get()) is not None:
        return caller
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_pool = Workers("pageferry-call", 64)


async def in_thread(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Run a call on a daemon thread. On cancellation the call continues, and its result is dropped.

    Unlike the threads of asyncio.to_thread, the thread does not keep the process from exiting while the call blocks.
    """
    return await asyncio.wrap_future(_pool.submit(lambda: call(*arguments, **options)))


async def on_thread(call: Callable[[], T], cancel: Callable[[], object] | None = None) -> T:
    """Run a call on a daemon thread. On cancellation, call `cancel` and wait for the thread before raising."""
    task = asyncio.ensure_future(in_thread(call))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if cancel is not None:
            cancel()
        with contextlib.suppress(Exception):
            await task
        raise


def interruptible(call: Callable[[], T]) -> T:
    """Run a call on a daemon thread and wait for its result, so that Ctrl-C ends the wait at once.

    The call itself continues after an interrupt, and its result is dropped. In any thread but the main thread, run the
    call directly, because signals do not interrupt it.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()  # signal handlers run in the main thread only
    return _pool.submit(call).result()


def synchronous(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Return the synchronous form of a public coroutine function, whose name ends in `_async`.

    The synchronous form runs the coroutine on a separate event loop. It raises UsageError in a thread whose event
    loop is running, because it would block that loop. Ctrl-C cancels the operation before KeyboardInterrupt is raised.
    """
    name = function.__name__.removesuffix("_async")

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(function(*arguments, **options))
        raise UsageError(f"{name}() would block the running event loop: await {name}_async() instead")

    call.__name__ = name
    call.__qualname__ = name
    return call


async def beside_loop(work: Work[T], listen: Callable[[Any], object]) -> T:
    """Run a coroutine on an event loop in a separate thread, so that it continues while the caller's loop is blocked.

    `work` receives a listener for its events. `listen` is called with each event on the caller's loop, in order, before
    this function returns. If `listen` raises, the work is cancelled, and the error is raised. Cancellation cancels the
    work and waits for its end. Tasks that the work leaves on its loop continue after this function has returned.
    """
    operation = _Operation(work, listen)
    threading.Thread(target=copy_context().run, args=(operation.run,), name="pageferry-loop", daemon=True).start()
    return await operation.outcome()


class _Operation(Generic[T]):
    """Coroutine on a separate event loop, and the loop that awaits it."""

    def __init__(self, work: Work[T], listen: Callable[[Any], object]) -> None:
        self._work = work
        self._listen = listen
        self._caller = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._caller.create_future()
        self._lock = threading.Lock()
        self._task: asyncio.Task[T] | None = None
        self._cancelled = False
        self._ended: asyncio.Task[T] | None = None
        self._unheard: Exception | None = None
        """First error that the listener raised; None if there was none."""

    # -- on the caller's loop

    async def outcome(self) -> T:
        """Wait for the end of the work. Return its result, or raise its error."""
        while not self._done.done():
            try:
                await asyncio.shield(self._done)
            except asyncio.CancelledError:
                self._cancel()
        (ended, self._ended), (unheard, self._unheard) = (self._ended, None), (self._unheard, None)
        try:
            if ended is None:
                raise RuntimeError("the event loop of the operation was closed before the operation finished")
            if unheard is not None and ended.cancelled():
                raise unheard
            if unheard is not None:
                self._caller.call_exception_handler({"message": "a listener failed", "exception": unheard})
            return ended.result()
        except BaseException as error:
            tracebacks.release(error)
            raise
        finally:
            del ended, unheard  # a stored error would keep them alive through this frame

    def _cancel(self) -> None:
        with self._lock:
            self._cancelled, task = True, self._task
        if task is not None:
            with contextlib.suppress(RuntimeError):  # the loop of the task has just been closed
                task.get_loop().call_soon_threadsafe(task.cancel)

    def _hear(self, event: Any) -> None:
        try:
            result = self._listen(event)
            if inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()
                raise TypeError(
                    "the listener returned an awaitable, which would never be awaited: pass a plain function"
                )
        except Exception as error:
            self._unheard = self._unheard or error
            self._cancel()

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    # -- in the thread of the operation

    def run(self) -> None:
        """Run the work, and then the tasks that it has left on its loop."""
        CALLER.set(self._caller)
        try:
            asyncio.run(self._supervise())
        finally:
            del self._work  # releases the arena that the work refers to, before the caller continues
            self._post(self._finish)

    async def _supervise(self) -> None:
        task = asyncio.ensure_future(self._work(lambda event: self._post(self._hear, event)))
        with self._lock:
            self._task = task
            if self._cancelled:
                task.cancel()
        await asyncio.wait({task})
        with self._lock:
            self._ended, self._task = task, None
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            self._post(self._finish)
            await asyncio.wait(left)

    def _post(self, call: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed: the caller no longer waits
            self._caller.call_soon_threadsafe(call, *arguments)
