"""Tests of the end of a take-over: the task that announces the workload ends too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pageferry.errors import MigrationError
from pageferry.migration import takeover
from pageferry.migration.takeover import TakeOver


class Silent:
    """Workload that does not respond."""

    async def announce(self) -> bool:
        return False


class Channel:
    """Channel whose close fails if `fails` is true."""

    def __init__(self, *, fails: bool) -> None:
        self._fails = fails

    async def close(self) -> None:
        if self._fails:
            raise OSError("cannot close")


async def never() -> None:
    await asyncio.sleep(60)


def announcing(monkeypatch: pytest.MonkeyPatch, fetch: Callable[[], Awaitable[Any]], *, fails: bool) -> Any:
    """Return a take-over in post-copy that announces its workload. `fetch`: function that fetches the pages."""
    monkeypatch.setattr(takeover, "ANNOUNCE_AGAIN", 0.01)
    taken: Any = TakeOver.__new__(TakeOver)
    taken._incoming = SimpleNamespace(channel=Channel(fails=fails), workload=Silent())
    taken._transfer = SimpleNamespace(postcopy=SimpleNamespace(wait_complete=fetch))
    taken._announcing = asyncio.create_task(taken._announce())
    return taken


def test_announcement_ends_if_the_connection_cannot_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "ANNOUNCE_TIMEOUT", 0.05)

    async def fail() -> None:
        raise RuntimeError("fetch failed")

    async def run() -> None:
        taken = announcing(monkeypatch, fail, fails=True)
        with pytest.raises(OSError, match="cannot close"):
            await taken.report()
        await asyncio.wait({taken._announcing}, timeout=1)
        assert taken._announcing.cancelled()

    asyncio.run(run())


def test_cancelled_report_does_not_wait_for_the_announcement(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        taken = announcing(monkeypatch, never, fails=False)
        report = asyncio.create_task(taken.report())
        await asyncio.sleep(0.05)
        begin = time.monotonic()
        report.cancel()
        with pytest.raises(asyncio.CancelledError):
            await report
        assert time.monotonic() - begin < 5
        assert taken._announcing.cancelled()

    asyncio.run(run())


def test_report_cancelled_during_the_last_announcement_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        raise MigrationError("the link is lost")

    async def run() -> None:
        taken = announcing(monkeypatch, fail, fails=False)
        report = asyncio.create_task(taken.report())
        await asyncio.sleep(0.05)
        report.cancel()
        with pytest.raises(asyncio.CancelledError):
            await report
        await asyncio.wait({taken._announcing}, timeout=1)
        assert taken._announcing.cancelled()

    asyncio.run(run())
