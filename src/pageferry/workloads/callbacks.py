"""Callbacks of a program: plain functions, coroutine functions, and context managers (synchronous or asynchronous).

Plain functions and context managers run in the calling thread, which belongs to the arena. Coroutines and asynchronous
context managers run on an event loop of the program, while the calling thread waits for them. Methods of asyncio's own
objects (`asyncio.Lock.release`) also run on the loop, because those objects are not thread-safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

from pageferry.errors import WorkloadError
from pageferry.host.blocking import CALLER, is_blocked

Plain = Callable[[], object]
Callback = Plain | AbstractContextManager[Any] | AbstractAsyncContextManager[Any]

START_TIMEOUT = 10.0
"""Seconds within which an event loop must start a coroutine. A loop that takes longer counts as blocked."""

_POLL = 0.5
_ASYNCIO = (asyncio.Lock, asyncio.Event, asyncio.Condition, asyncio.Semaphore, asyncio.Queue)
_THREADING = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Semaphore)
_DECORATORS = (contextlib.ContextDecorator, contextlib.AsyncContextDecorator)


def check(name: str, callback: object, *, gate: bool = False) -> None:
    """Raise TypeError if a callback cannot be called, or is a generator function. `gate`: also accept a context
    manager."""
    function = _underlying(callback)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"invalid `{name}`: it is a generator function, which does nothing when it is called; decorate it with "
            "contextlib.contextmanager or contextlib.asynccontextmanager"
        )
    if not callable(callback) and not (gate and is_manager(callback)):
        expected = "a function, a coroutine function or a context manager" if gate else "a function"
        raise TypeError(f"invalid `{name}` of type {type(callback).__name__}: expected {expected}")


def check_listener(name: str, listener: object) -> None:
    """Raise TypeError for an invalid listener, or one that is a coroutine function: listeners are not awaited."""
    check(name, listener)
    if inspect.iscoroutinefunction(_underlying(listener)):
        raise TypeError(
            f"invalid `{name}`: it is a coroutine function, which would never be awaited; pass a plain function, such "
            "as asyncio.Queue.put_nowait"
        )


def needs_loop(callback: object) -> bool:
    """Return whether the callback must run on an event loop. Return False if this is not known before the call."""
    function = _underlying(callback)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(inspect.unwrap(function)):
        return True
    if isinstance(getattr(callback, "__self__", None), _ASYNCIO):
        return True
    return not callable(callback) and isinstance(callback, AbstractAsyncContextManager)


def acquires_lock(callback: object) -> bool:
    """Return whether the callback is the `acquire` method of a lock of `threading`."""
    return getattr(callback, "__name__", "") == "acquire" and isinstance(
        getattr(callback, "__self__", None), _THREADING
    )


class Callbacks:
    """Runner of callbacks. `loop`: event loop of the program, for coroutines; None for the loop of the caller that
    awaits the operation."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self._exits: list[Callable[[], object]] = []
        """Exit functions of the entered context managers."""
        self._running: asyncio.Task[Any] | None = None

    def call(self, name: str, callback: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function or a coroutine function, and return its result. Raises WorkloadError if the event loop is
        missing or blocked."""
        if isinstance(getattr(callback, "__self__", None), _ASYNCIO):
            return self._on_loop(name, functools.partial(_call, callback, *arguments))
        result = callback(*arguments)
        if not inspect.isawaitable(result):
            return result
        try:
            return self._on_loop(name, lambda: _awaited(result))
        except WorkloadError:
            if inspect.iscoroutine(result):
                result.close()  # if it has not started
            raise

    def enter(self, name: str, callback: Callback) -> None:
        """Call a function, or enter a context manager: the callback itself, or the one that the function returns."""
        manager: object = callback
        if not is_manager(callback) or (callable(callback) and not isinstance(callback, _DECORATORS)):
            assert callable(callback)
            manager = self.call(name, callback)
        if isinstance(manager, AbstractAsyncContextManager):
            entered = manager
            self._on_loop(name, lambda: _awaited(entered.__aenter__()))
            self._exits.append(lambda: self._on_loop(name, lambda: _awaited(entered.__aexit__(None, None, None))))
        elif isinstance(manager, AbstractContextManager):
            manager.__enter__()
            self._exits.append(functools.partial(manager.__exit__, None, None, None))

    def exit(self) -> None:
        """Exit the entered context managers, in reverse order."""
        while self._exits:
            self._exits.pop()()

    def cancel(self) -> None:
        """Cancel the coroutine that a `call` in another thread is running."""
        task = self._running
        if task is not None:
            with contextlib.suppress(RuntimeError):  # its loop has just been closed
                task.get_loop().call_soon_threadsafe(task.cancel)

    def _on_loop(self, name: str, make: Callable[[], Awaitable[Any]]) -> Any:
        loop = self._usable_loop(name)
        begun = threading.Event()
        claimed = threading.Lock()  # taken by the coroutine when it starts, or by the caller after a timeout

        async def run() -> Any:
            if not claimed.acquire(blocking=False):
                return None
            self._running = asyncio.current_task()
            begun.set()
            return await make()

        future = asyncio.run_coroutine_threadsafe(run(), loop)
        try:
            if not begun.wait(START_TIMEOUT) and claimed.acquire(blocking=False):
                raise WorkloadError(
                    f"cannot run {name}: the event loop of the program has been blocked for {START_TIMEOUT:g} s; "
                    "if it waits for a lock that on_pause holds, use asyncio.Lock in coroutines, or plain "
                    "functions only"
                )
            return self._wait(name, future, loop)
        finally:
            self._running = None

    def _wait(self, name: str, future: Future[Any], loop: asyncio.AbstractEventLoop) -> Any:
        while True:
            with contextlib.suppress(TimeoutError):
                return future.result(_POLL)
            if future.done():
                return future.result()
            if not loop.is_running():
                raise WorkloadError(f"cannot finish {name}: the event loop of the program was closed")

    def _usable_loop(self, name: str) -> asyncio.AbstractEventLoop:
        loop = self.loop if self.loop is not None and self.loop.is_running() else CALLER.get()
        if loop is None or not loop.is_running():
            raise WorkloadError(
                f"cannot run {name}: it is a coroutine function, and there is no event loop; create the arena in "
                "a coroutine, or pass its event loop as `loop`"
            )
        if is_blocked(loop):
            raise WorkloadError(
                f"cannot run {name}: it is a coroutine function, and its event loop is blocked by this call; make "
                "the call in a thread with asyncio.to_thread, and pass the event loop as `loop`"
            )
        return loop


def _call(callback: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
    result = callback(*arguments)
    return result if inspect.isawaitable(result) else _immediate(result)


async def _immediate(result: Any) -> Any:
    return result


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


def is_manager(callback: object) -> bool:
    """Return whether the callback is a context manager, synchronous or asynchronous."""
    return isinstance(callback, AbstractContextManager | AbstractAsyncContextManager)


def _underlying(callback: object) -> Any:
    """Return the function behind partial objects, bound methods and callable objects."""
    while isinstance(callback, functools.partial):
        callback = callback.func
    if inspect.isroutine(callback) or inspect.isclass(callback):
        return callback
    return type(callback).__call__ if callable(callback) else callback
