"""Callbacks of an arena: functions, coroutine functions and context managers. None of them can cause a deadlock."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import pageferry
from pageferry.errors import UsageError, WorkloadError
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.lifecycle import Status
from tests.kernel.programs import wait_until

HERE = Path(__file__).parent
MIB = 1 << 20
KINDS = [
    "methods",
    "async-methods",
    "async-functions",
    "lock",
    "async-lock",
    "reentrant-lock",
    "gate",
    "async-gate",
    "threads",
    "threads-async",
]

pytestmark = pytest.mark.usefixtures("root")


def torn(kind: str, operation: str, folder: Path) -> str:
    """Run `callback_programs` for at most 60 s, and return the last line of its output."""
    program = [sys.executable, "-m", "tests.kernel.callback_programs", kind, operation, str(folder)]
    done = subprocess.run(program, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_images_taken_under_writes_are_not_torn(kind: str, tmp_path: Path) -> None:
    assert torn(kind, "checkpoint", tmp_path) == "torn 0 of 8"


@pytest.mark.parametrize("kind", ["lock", "async-functions", "async-gate", "threads"])
def test_migration_under_writes_is_not_torn(kind: str, tmp_path: Path) -> None:
    assert torn(kind, "migrate", tmp_path) == "torn 0 of 1"


def test_lock_held_after_a_move_is_refused() -> None:
    """A coroutine that waits for the lock would block the loop that awaits the migration."""
    turn = threading.Lock()

    async def main() -> None:
        arena = Arena(MIB, on_pause=turn.acquire, on_resume=turn.release)
        handler = asyncio.create_task(asyncio.sleep(60))
        with pytest.raises(UsageError, match="on_moved"):
            await pageferry.migrate_async(arena, "127.0.0.1:1")
        with pytest.raises(UsageError, match="on_moved"):
            arena.register("locked")
        handler.cancel()

    asyncio.run(main())
    assert not turn.locked()


def test_coroutine_callbacks_run_on_the_loop_that_made_the_arena(tmp_path: Path) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def note() -> None:
        loops.append(asyncio.get_running_loop())

    async def main() -> None:
        arena = Arena(MIB, on_pause=note, on_resume=note)
        home = asyncio.get_running_loop()
        await asyncio.to_thread(lambda: pageferry.checkpoint(arena, tmp_path / "image"))
        assert loops == [home, home]

    asyncio.run(main())


def test_coroutine_callbacks_of_state_are_awaited(tmp_path: Path) -> None:
    loaded: list[bytes] = []

    async def save() -> bytes:
        await asyncio.sleep(0)
        return b"state"

    async def load(state: bytes) -> None:
        await asyncio.sleep(0)
        loaded.append(state)

    async def main() -> None:
        arena = Arena(MIB, state=(save, load))
        await pageferry.checkpoint_async(arena, tmp_path / "image")
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(pageferry.restore, tmp_path / "image", state=(save, load), loop=loop)

    asyncio.run(main())
    assert loaded == [b"state"]


def test_restore_that_blocks_the_loop_of_its_callbacks_is_refused(tmp_path: Path) -> None:
    async def resume() -> None:
        pass

    async def main() -> None:
        await pageferry.checkpoint_async(Arena(MIB), tmp_path / "image")
        with pytest.raises(WorkloadError, match=r"asyncio\.to_thread"):
            pageferry.restore(tmp_path / "image", on_resume=resume)

    asyncio.run(main())


def test_coroutine_callback_whose_loop_is_blocked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`on_pause` is a plain function that acquires a `threading` lock. A handler waits for the lock, which blocks the
    loop of the callbacks.
    """
    monkeypatch.setattr("pageferry.workloads.callbacks.START_TIMEOUT", 0.5)
    turn = threading.Lock()
    paused, waits = threading.Event(), threading.Event()

    def pause() -> None:
        turn.acquire()
        paused.set()
        waits.wait()

    async def save() -> bytes:
        return b""

    async def handler() -> None:
        await asyncio.to_thread(paused.wait)
        waits.set()
        with turn:  # blocks the loop
            pass

    async def main() -> None:
        arena = Arena(MIB, state=(save, lambda _: None), on_pause=pause, on_resume=turn.release)
        task = asyncio.create_task(handler())
        with pytest.raises(WorkloadError, match="blocked"):
            await pageferry.checkpoint_async(arena, tmp_path / "image")
        assert arena.status is Status.RUNNING
        await task

    asyncio.run(main())


def test_hanging_pause_does_not_delay_cancellation(tmp_path: Path) -> None:
    """A plain function cannot be cancelled: the arena resumes only when the function returns."""
    begun, end, calls = threading.Event(), threading.Event(), []

    def pause() -> None:
        begun.set()
        end.wait()

    async def main() -> None:
        arena = Arena(MIB, on_pause=pause, on_resume=lambda: calls.append("resume"))
        task = asyncio.create_task(pageferry.checkpoint_async(arena, tmp_path / "image"))
        await asyncio.to_thread(begun.wait)
        before = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - before < 1
        assert calls == []
        end.set()
        await asyncio.to_thread(wait_until, lambda: calls == ["resume"], "the resume callback")
        assert (arena.status, calls) == (Status.RUNNING, ["resume"])

    asyncio.run(main())


def test_hanging_coroutine_callback_is_cancelled(tmp_path: Path) -> None:
    calls: list[str] = []

    async def pause() -> None:
        try:
            calls.append("pause")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            calls.append("cancelled")
            raise

    async def main() -> None:
        arena = Arena(MIB, on_pause=pause, on_resume=lambda: calls.append("resume"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await pageferry.checkpoint_async(arena, tmp_path / "image")
        await asyncio.to_thread(wait_until, lambda: len(calls) == 3, "the resume callback")
        assert (arena.status, calls) == (Status.RUNNING, ["pause", "cancelled", "resume"])

    asyncio.run(main())


def test_invalid_callbacks_are_refused() -> None:
    def generator() -> Iterator[None]:
        yield

    for wrong in (generator, 5, object()):
        with pytest.raises(TypeError, match="on_pause"):
            Arena(MIB, on_pause=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on_resume"):
        Arena(MIB, on_resume=threading.Lock())  # type: ignore[arg-type]


def test_named_arena_with_coroutine_callbacks_needs_a_loop() -> None:
    async def pause() -> None:
        pass

    with pytest.raises(UsageError, match="loop"):
        Arena(MIB, "loopless", on_pause=pause)


async def _listen(_: Any) -> None:
    """Do nothing. This coroutine function is not a valid listener: a call returns a coroutine."""


def _listen_later(event: Any) -> Any:
    return _listen(event)


@pytest.mark.parametrize("listener", [_listen, _listen_later])
def test_coroutine_listener_is_refused(listener: Any, tmp_path: Path) -> None:
    arena = Arena(MIB)
    calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: pageferry.checkpoint_async(arena, tmp_path / "image", listener=listener),
        lambda: pageferry.migrate_async(arena, "127.0.0.1:1", listener=listener),
        lambda: pageferry.receive_async("127.0.0.1:0", listening=listener),
    ]
    if listener is not _listen:  # the result is checked at the first event, which follows the connection
        del calls[1]
    for call in calls:
        with pytest.raises(TypeError, match="awaited"):
            asyncio.run(asyncio.wait_for(call(), 10))


def test_listener_is_called_on_the_loop_of_the_caller(tmp_path: Path) -> None:
    threads: set[int] = set()

    async def main() -> None:
        await pageferry.checkpoint_async(
            Arena(MIB), tmp_path / "image", listener=lambda _: threads.add(threading.get_ident())
        )

    asyncio.run(main())
    assert threads == {threading.get_ident()}


def test_error_of_a_listener_ends_the_operation(tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    arena = Arena(MIB)
    with pytest.raises(ZeroDivisionError):
        pageferry.checkpoint(arena, tmp_path / "image", listener=fail, bandwidth=1000)
    assert arena.status is Status.RUNNING


def test_named_arena_is_paused_on_its_loop(tmp_path: Path) -> None:
    """Another process pauses the arena through the control socket of the arena."""
    script = (
        "import asyncio, sys\n"
        "from pageferry.checkpoints.save import checkpoint_async\n"
        "from pageferry.workloads.open import open_workload\n"
        "async def main():\n"
        "    workload = await open_workload('gated')\n"
        "    await checkpoint_async(workload, sys.argv[1])\n"
        "asyncio.run(main())\n"
    )
    calls: list[object] = []

    async def main() -> None:
        home = asyncio.get_running_loop()

        async def note() -> None:
            calls.append(asyncio.get_running_loop() is home)

        with Arena(MIB, "gated", on_pause=note, on_resume=note):
            child = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(tmp_path / "image"))
            assert await asyncio.wait_for(child.wait(), 60) == 0

    asyncio.run(main())
    assert calls == [True, True]
