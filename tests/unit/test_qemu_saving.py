"""Test of a cancellation while QEMU starts to save the device state, with a monitor that is not QEMU's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from qemu.qmp import EventListener

from pageferry.workloads.qemu.device_state import Saving


class Monitor:
    """Monitor whose migration waits in `pre-switchover` until it is cancelled. The reply to `migrate` is late."""

    def __init__(self) -> None:
        self.status = "none"
        self.started = asyncio.Event()

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventListener]:
        yield EventListener(names)

    async def give_descriptor(self, name: str, descriptor: int) -> None: ...

    async def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        match command:
            case "migrate":
                self.status = "pre-switchover"
                self.started.set()
                await asyncio.sleep(60)
            case "migrate_cancel":
                self.status = "cancelled"
        return {"status": self.status}


def test_migration_is_cancelled_if_the_reply_to_its_start_is_not_awaited() -> None:
    async def scenario() -> str:
        monitor = Monitor()
        beginning = asyncio.create_task(Saving.begin(monitor))  # type: ignore[arg-type]
        await monitor.started.wait()
        beginning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await beginning
        return monitor.status

    assert asyncio.run(scenario()) == "cancelled"
