"""Tests of the take-over at the destination, with a workload that does not respond."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pageferry.host.stopwatch import Stopwatch
from pageferry.migration import takeover
from pageferry.migration.ownership import CommitDecision
from pageferry.migration.takeover import TakeOver
from pageferry.workloads.protocols import Faults


class Guest:
    """Workload whose first announcement is not complete until its pages are present, as if QEMU waited for a page."""

    stays_paused = False

    def __init__(self) -> None:
        self.present = asyncio.Event()
        self.announced = 0

    async def commit(self, _: object) -> None: ...

    async def resume(self) -> None: ...

    def faults(self) -> Faults:
        return Faults(0, 0)

    async def announce(self) -> bool:
        responds = self.present.is_set()
        await self.present.wait()
        self.announced += responds
        return responds


def take_over(guest: Guest, sent: list[Any]) -> TakeOver:
    async def send(message: object) -> None:
        sent.append(message)

    incoming: Any = SimpleNamespace(
        workload=guest, hello=SimpleNamespace(migration="m"), times=Stopwatch("resume"), send=send
    )
    decisions: Any = SimpleNamespace(witness=lambda _: None, decide=lambda *_: CommitDecision.COMMITTED)
    transfer: Any = SimpleNamespace(postcopy=object())
    recovery: Any = SimpleNamespace(arrivals=None)
    return TakeOver(incoming, transfer, decisions, recovery)


def test_workload_is_taken_over_while_it_waits_for_missing_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The announcement is tried again until the workload responds."""
    monkeypatch.setattr(takeover, "ANNOUNCE_AGAIN", 0.01)

    async def scenario() -> None:
        guest, sent = Guest(), list[Any]()
        taking = take_over(guest, sent)
        async with asyncio.timeout(5):
            await taking.run()
            assert len(sent) == 1
            await asyncio.sleep(0)
            assert guest.announced == 0
            guest.present.set()
            await taking._end_announcement()
        assert guest.announced == 1

    asyncio.run(scenario())


def test_end_of_a_migration_does_not_wait_for_a_workload_that_never_responds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "ANNOUNCE_TIMEOUT", 0.05)

    async def scenario() -> None:
        guest = Guest()
        taking = take_over(guest, [])
        async with asyncio.timeout(5):
            await taking.run()
            await taking._end_announcement()
        assert guest.announced == 0

    asyncio.run(scenario())
