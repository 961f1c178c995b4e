"""Tests of the synchronous forms of public coroutine functions."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pageferry
from pageferry import large_pages, sharing
from pageferry.errors import PageferryError
from pageferry.host.blocking import asynchronous, in_thread, interruptible, on_new_loop, synchronous

PARTS = (pageferry, large_pages, sharing)
FORMS = [
    pytest.param(getattr(part, name.removesuffix("_async")), getattr(part, name), id=name)
    for part in PARTS
    for name in part.__all__
    if name.endswith("_async")
]


@pytest.mark.parametrize("part", PARTS)
def test_every_public_coroutine_function_has_a_synchronous_form(part: ModuleType) -> None:
    coroutines = {name for name in part.__all__ if inspect.iscoroutinefunction(getattr(part, name))}
    assert {name for name in part.__all__ if name.endswith("_async")} == coroutines
    assert {name.removesuffix("_async") for name in coroutines} <= set(part.__all__)


@pytest.mark.parametrize(("call", "coroutine"), FORMS)
def test_both_forms_have_the_same_parameters_and_text(call: Callable[..., Any], coroutine: Callable[..., Any]) -> None:
    assert call.__name__ == coroutine.__name__.removesuffix("_async")
    if call.__name__ != "restore":
        assert inspect.signature(call) == inspect.signature(coroutine)
        assert inspect.getdoc(call) == inspect.getdoc(coroutine)


def test_synchronous_forms_work_in_a_thread_whose_event_loop_is_running(tmp_path: Path) -> None:
    async def cell() -> None:  # as a notebook runs its cells
        arena = pageferry.Arena(4096, on_pause=threading.Lock())
        memoryview(arena)[7] = 5
        events: list[object] = []
        assert pageferry.checkpoint(arena, tmp_path / "image", listener=events.append).downtime >= 0
        assert events
        assert memoryview(pageferry.restore(tmp_path / "image"))[7] == 5
        pageferry.dump({"x": bytearray(b"y")}, tmp_path / "object")
        assert pageferry.load(tmp_path / "object") == {"x": b"y"}
        with pytest.raises(PageferryError, match="nothing"):
            pageferry.stop("nothing")

    asyncio.run(cell())


def test_callback_that_needs_the_blocked_loop_is_refused(tmp_path: Path) -> None:
    async def pause() -> None: ...

    async def cell() -> None:
        arena = pageferry.Arena(4096, on_pause=pause)
        with pytest.raises(PageferryError, match="event loop"):
            pageferry.checkpoint(arena, tmp_path / "image")
        await pageferry.checkpoint_async(arena, tmp_path / "image")

    asyncio.run(cell())


def test_request_to_the_own_control_socket_is_refused_at_once_if_it_needs_the_blocked_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEFERRY_RUN_DIR", str(tmp_path / "run"))

    async def pause() -> None: ...

    async def cell() -> None:
        arena = pageferry.Arena(4096, "own", on_pause=pause)
        begun = time.monotonic()
        with pytest.raises(PageferryError, match="its event loop is blocked by this call"):
            pageferry.checkpoint_guest("own", tmp_path / "image")
        assert time.monotonic() - begun < 5
        await pageferry.checkpoint_guest_async("own", tmp_path / "image")
        arena.close()

    asyncio.run(cell())


def interrupt_after(seconds: float) -> None:
    """Interrupt this process after a time, as Ctrl-C does."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


@pytest.mark.parametrize("handler", ["asyncio", "python"])
def test_interrupt_of_a_form_beside_a_running_loop_cancels_the_operation_first(handler: str) -> None:
    ended = []

    async def wait_async() -> None:
        try:
            interrupt_after(0.1)
            await asyncio.sleep(5)
        finally:
            ended.append(True)

    async def cell() -> None:
        if handler == "python":  # the handler of a notebook
            signal.signal(signal.SIGINT, signal.default_int_handler)
        found = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            synchronous(wait_async)()
        assert ended == [True]
        assert signal.getsignal(signal.SIGINT) is found

    asyncio.run(cell())


def test_second_interrupt_cancels_the_cleanup_and_waits_for_its_end() -> None:
    ended = []

    async def wait_async() -> None:
        try:
            interrupt_after(0.1)
            await asyncio.sleep(5)
        finally:
            try:
                interrupt_after(0.1)
                await asyncio.sleep(5)
            finally:
                ended.append(True)

    async def cell() -> None:
        with pytest.raises(KeyboardInterrupt):
            synchronous(wait_async)()
        assert ended == [True]

    begun = time.monotonic()
    asyncio.run(cell())
    assert time.monotonic() - begun < 4


def test_interrupt_beside_a_running_loop_ends_the_wait_for_a_call() -> None:
    async def cell() -> None:
        interrupt_after(0.1)
        with pytest.raises(KeyboardInterrupt):
            interruptible(lambda: time.sleep(5))

    begun = time.monotonic()
    asyncio.run(cell())
    assert time.monotonic() - begun < 4


def test_program_keeps_its_own_handler_of_interrupts() -> None:
    heard = []

    async def wait_async() -> int:
        interrupt_after(0.1)
        await asyncio.sleep(0.3)
        return 5

    async def cell() -> None:
        found = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
        assert synchronous(wait_async)() == 5
        signal.signal(signal.SIGINT, found)

    asyncio.run(cell())
    assert heard == [signal.SIGINT]


async def leaf_async() -> None:
    """Await a call in a thread, as the operations of the project do."""
    await in_thread(time.sleep, 0.05)


@pytest.mark.parametrize("count", [1, 80])
def test_many_operations_that_wait_for_threads_end(count: int) -> None:
    async def cell() -> None:
        await asyncio.gather(*[asynchronous(lambda: on_new_loop(leaf_async))() for _ in range(count)])

    asyncio.run(asyncio.wait_for(cell(), 10))
    threads = [threading.Thread(target=on_new_loop, args=(leaf_async,), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_interrupt_cancels_the_operation_first() -> None:
    ended = []

    async def wait_async() -> None:
        try:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        synchronous(wait_async)()
    assert ended == [True]
