"""Tests of guests in the foreground."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from pageferry.cli.foreground import run_all_in_foreground
from pageferry.errors import WorkloadError
from pageferry.workloads.qemu.guest import QemuWorkload


class Guest:
    """Guest whose QEMU exits with `code`, after the other guests if `last`. If `code` is None, QEMU does not exit."""

    def __init__(self, name: str, code: int | None, *, last: bool = False) -> None:
        self.name = name
        self._code = code
        self._last = last
        self.end = ""

    async def ended(self) -> int:
        if self._code is None:
            await asyncio.Event().wait()
        for _ in range(20 if self._last else 0):
            await asyncio.sleep(0)
        assert self._code is not None
        return self._code

    async def discard(self) -> None:
        await asyncio.sleep(0)
        self.end = "terminated"

    async def forget(self, cause: str) -> None:
        self.end = cause


def run_all(*guests: Guest) -> asyncio.Task[None]:
    workloads = [cast("QemuWorkload", guest) for guest in guests]
    return asyncio.ensure_future(run_all_in_foreground(workloads, "qemu"))


def test_guest_that_fails_does_not_end_the_others() -> None:
    async def run() -> None:
        guests = Guest("a", 0, last=True), Guest("b", -9), Guest("c", 3, last=True)
        with pytest.raises(WorkloadError, match="b: qemu was killed by SIGKILL"):
            await run_all(*guests)
        assert [guest.end for guest in guests] == ["exited"] * 3

    asyncio.run(run())


def test_cancellation_terminates_all_guests() -> None:
    async def run() -> None:
        guests = Guest("a", None), Guest("b", 1), Guest("c", None)
        running = run_all(*guests)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not running.done()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert [guest.end for guest in guests] == ["terminated", "exited", "terminated"]

    asyncio.run(run())
