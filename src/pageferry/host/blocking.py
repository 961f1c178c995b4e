"""Blocking calls from coroutines, and operations on a separate event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import signal
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextvars import ContextVar, copy_context
from typing import Any, Generic, ParamSpec, TypeVar

from pageferry.host import tracebacks
from pageferry.host.workers import Workers, in_new_thread

T = TypeVar("T")
P = ParamSpec("P")

NICENESS = 5
"""Niceness of threads in the background, as that of the engine's."""

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
    return _running_loop()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in the calling thread; None if there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_BLOCKED: ContextVar[Collection[asyncio.AbstractEventLoop]] = ContextVar("blocked", default=())
"""Event loops whose threads wait for the current operation."""
_all_blocked: list[asyncio.AbstractEventLoop] = []
"""Event loops that wait for any operation of this process."""


def is_blocked(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether the thread of an event loop is blocked because it waits for the current operation."""
    return loop in _BLOCKED.get()


def serve_this_process() -> None:
    """Treat the operations of the current context as requests of this process itself: any of its blocked event loops
    may be waiting for them."""
    _BLOCKED.set(_all_blocked)


@contextlib.contextmanager
def blocking_loop() -> Iterator[None]:
    """Mark the event loop of the calling thread as blocked, so that callbacks that need the loop are refused."""
    if (loop := _running_loop()) is None:
        yield
        return
    token = _BLOCKED.set((loop,))
    _all_blocked.append(loop)
    try:
        yield
    finally:
        _all_blocked.remove(loop)
        _BLOCKED.reset(token)


_pool = Workers("pageferry-call", 64)


async def in_thread(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Run a call on a daemon thread. On cancellation the call continues, and its result is dropped.

    Unlike the threads of asyncio.to_thread, the thread does not keep the process from exiting while the call blocks.
    The number of these threads is limited: the call must not wait for another call of `in_thread`.
    """
    return await asyncio.wrap_future(_pool.submit(lambda: call(*arguments, **options)))


async def in_own_thread(call: Callable[[], T]) -> T:
    """Run a call, which may wait for calls of `in_thread`, on a new daemon thread. On cancellation the call continues,
    and its result is dropped."""
    return await asyncio.wrap_future(in_new_thread("pageferry-call", call))


async def on_thread(call: Callable[[], T], cancel: Callable[[], object] | None = None) -> T:
    """Run a call as `in_own_thread` does. On cancellation, call `cancel`, and wait for the thread before raising."""
    task = asyncio.ensure_future(in_own_thread(call))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if cancel is not None:
            cancel()
        with contextlib.suppress(Exception):
            await task
        raise


async def in_background(call: Callable[[], T]) -> T:
    """Run a call as `on_thread` does, with a lower priority than the workload and the threads for which it waits."""

    def lowered() -> T:
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(os.getpriority(os.PRIO_PROCESS, thread), NICENESS))
        return call()

    return await on_thread(lowered)


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that is not interrupted. On cancellation, wait for its end before raising."""
    task = asyncio.ensure_future(work)
    if (cancelled := await _cancelled_until_end(task)) is not None:
        with contextlib.suppress(Exception):
            task.result()
        raise cancelled
    return task.result()


async def ignoring_cancellation(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that is not interrupted, and return its result. Cancellations are dropped: the effects of `work`
    cannot be undone, and its result reports them."""
    task = asyncio.ensure_future(work)
    await _cancelled_until_end(task)
    return task.result()


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel a task unless it has ended, and wait for its end, which cancellations of the caller do not interrupt."""
    if not task.done():
        task.cancel()
        await _cancelled_until_end(task)


async def _cancelled_until_end(task: asyncio.Task[Any]) -> asyncio.CancelledError | None:
    """Wait until a task has ended. Return the last cancellation of the caller during the wait; None if there was
    none."""
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


def interruptible(call: Callable[[], T]) -> T:
    """Run a call on a daemon thread and wait for its result, so that Ctrl-C ends the wait at once.

    The call itself continues after an interrupt, and its result is dropped. In any thread but the main thread, run the
    call directly, because signals do not interrupt it.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()  # signal handlers run in the main thread only
    with _interrupts():
        return in_new_thread("pageferry-call", call).result()


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the main thread while that thread blocks the event loop of asyncio.run,
    whose own handler only cancels a task of this loop. The handler of a program is not replaced."""
    main = threading.current_thread() is threading.main_thread()
    found = signal.getsignal(signal.SIGINT) if main else None
    handler = found.func if isinstance(found, functools.partial) else found
    if not isinstance(getattr(handler, "__self__", None), asyncio.Runner):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, found)


def on_new_loop(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on a new event loop, and wait for its result. The loop is in another thread, unless the calling
    thread has no loop and is not the main thread. Ctrl-C cancels the coroutine, waits for its end, and then raises
    KeyboardInterrupt. A further Ctrl-C cancels it again."""
    if threading.current_thread() is not threading.main_thread() and _running_loop() is None:
        return asyncio.run(call())
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Future()

    async def run() -> T:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await call()

    with _interrupts():
        # Use no thread of the pool: calls that wait for further calls would exhaust the pool.
        result = in_new_thread("pageferry-loop", lambda: asyncio.run(run()))
        ends: list[Future[Any]] = [started, result]
        try:
            return result.result()
        except BaseException:
            while not result.done():
                with contextlib.suppress(BaseException):  # a further interrupt
                    wait(ends, return_when=FIRST_COMPLETED)
                    if started.done():
                        _cancel_task(*started.result())
                        wait([result])
            raise


def _cancel_task(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        with contextlib.suppress(RuntimeError):  # the loop has just been closed
            loop.call_soon_threadsafe(task.cancel)


def synchronous(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Return the synchronous form of a public coroutine function, whose name ends in `_async`.

    The synchronous form runs the coroutine on a separate event loop. In a thread whose event loop is running, such as
    that of a notebook, this loop is in another thread, and the running loop is blocked during the call: callbacks of
    the workload that need it are refused. Ctrl-C cancels the operation before KeyboardInterrupt is raised.
    """
    name = function.__name__.removesuffix("_async")

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        if _running_loop() is None:
            return asyncio.run(function(*arguments, **options))
        with blocking_loop():
            return on_new_loop(lambda: function(*arguments, **options))

    call.__name__ = name
    call.__qualname__ = name
    return call


def asynchronous(function: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Return the coroutine form of a public function that blocks. The function runs on a daemon thread.

    On cancellation, wait until the function has returned: its effect is then complete.
    """

    @functools.wraps(function)
    async def call(*arguments: P.args, **options: P.kwargs) -> T:
        return await on_thread(lambda: function(*arguments, **options))

    call.__name__ += "_async"
    call.__qualname__ = call.__name__
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
                raise RuntimeError("cannot finish the operation: its event loop was closed")
            if unheard is not None and ended.cancelled():
                raise unheard
            if unheard is not None:
                self._caller.call_exception_handler({"message": "a listener failed", "exception": unheard})
            return ended.result()
        except BaseException as error:
            tracebacks.release(error)
            raise
        finally:
            del ended, unheard  # a stored error would keep these alive through this frame

    def _cancel(self) -> None:
        with self._lock:
            self._cancelled, task = True, self._task
        if task is not None:
            _cancel_task(task.get_loop(), task)

    def _hear(self, event: Any) -> None:
        try:
            result = self._listen(event)
            if inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()
                raise TypeError(
                    "invalid `listener`: it returned an awaitable, which would never be awaited; pass a plain function"
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
