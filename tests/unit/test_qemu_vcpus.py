"""Tests of resuming the vCPUs with a monitor that is not QEMU's."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pageferry.errors import WorkloadError
from pageferry.workloads.qemu import vcpus
from pageferry.workloads.qemu.vcpus import Vcpus


class Monitor:
    """Monitor that rejects `cont` once in each of these run states, in order, and then accepts `cont`."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)
        self.sent = 0

    async def execute(self, command: str) -> dict[str, Any]:
        if command == "query-status":
            status = self.states.pop(0)
            return {"status": status, "running": status == "running"}
        self.sent += 1
        if self.states:
            raise WorkloadError("cannot execute QMP cont: Migration is not finalized yet")
        return {}


def cont(monitor: Any) -> None:
    seen: Any = SimpleNamespace(name="web")
    asyncio.run(Vcpus(1, SimpleNamespace(), seen, str)._send_cont(monitor))  # type: ignore[arg-type]


def test_guest_is_continued_when_a_cancelled_migration_has_ended() -> None:
    monitor = Monitor("finish-migrate", "finish-migrate")
    cont(monitor)
    assert monitor.sent == 3


def test_guest_that_the_end_of_a_migration_has_resumed_is_not_an_error() -> None:
    monitor = Monitor("running")
    cont(monitor)
    assert monitor.sent == 1


def test_rejection_for_another_reason_is_an_error() -> None:
    with pytest.raises(WorkloadError, match="not finalized") as caught:
        cont(Monitor("paused"))
    assert caught.value.never_ran


def test_wait_for_the_end_of_a_migration_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vcpus, "_FINISH_TIMEOUT", 0.02)
    with pytest.raises(WorkloadError, match="not finalized"):
        cont(Monitor(*["finish-migrate"] * 1000))
