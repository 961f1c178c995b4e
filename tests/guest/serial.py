"""The checker's output on a guest's serial line, read from the file that QEMU writes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TICK = re.compile(r"FERRY tick (\d+) writes=(\d+) verified=(\d+) passes=(\d+) errors=(\d+)\r?\n")

BOOT = 100.0
"""Timeout for the boot until the checker runs, on a busy machine without KVM, seconds."""


class GuestFailed(AssertionError):
    """Failure of a guest that crashed, found an incorrect page, or made no progress."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Counters of the checker."""

    number: int
    writes: int
    verified: int
    passes: int
    """Number of complete verifications of all pages."""
    errors: int


class Serial:
    """Serial line of one QEMU. A migrated guest writes to the serial line of its new QEMU."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def text(self) -> str:
        """All output of the guest until now."""
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    @property
    def bad(self) -> list[str]:
        """Lines that report incorrect pages."""
        return [line for line in self.text.splitlines() if "FERRY BAD" in line]

    @property
    def last(self) -> Tick | None:
        """Last tick; None before the first tick."""
        found = _TICK.findall(self.text)
        return Tick(*map(int, found[-1])) if found else None

    async def ready(self) -> None:
        """Wait until the checker has filled its memory. Raises the same errors as `ticks`.

        A guest that was ready in another QEMU or before a checkpoint only prints ticks.
        """
        await self._until(lambda: "FERRY ready" in self.text or self.last is not None, BOOT, "was not ready")

    async def ticks(self, count: int, timeout: float = 30.0) -> Tick:
        """Wait for `count` more ticks, and return the last tick.

        Raises GuestFailed if a page is incorrect, the guest crashes, or `timeout` (seconds) expires.
        """
        return await self._after(lambda tick: tick.number, count, timeout)

    async def passes(self, count: int, timeout: float = 60.0) -> Tick:
        """Wait for `count` more passes over all pages, and return the last tick.

        After two passes, each page has been verified again. Raises the same errors as `ticks`.
        """
        return await self._after(lambda tick: tick.passes, count, timeout)

    async def standstill(self, seconds: float = 1.0, timeout: float = 30.0) -> None:
        """Wait until no page has been written or verified for `seconds`. Ticks may continue on another CPU.

        Raises GuestFailed if `timeout` (seconds) expires.
        """
        loop = asyncio.get_running_loop()
        work, since = self._work, loop.time()
        deadline = since + timeout
        while loop.time() < since + seconds:
            await asyncio.sleep(0.02)
            if self._work != work:
                work, since = self._work, loop.time()
            if loop.time() > deadline:
                raise GuestFailed(f"the guest did not stop working within {timeout:g} s")

    @property
    def _work(self) -> tuple[int, int]:
        tick = self.last
        return (tick.writes, tick.verified) if tick is not None else (0, 0)

    async def _after(self, value: Callable[[Tick], int], count: int, timeout: float) -> Tick:
        await self._until(lambda: self.last is not None, timeout, "did not tick")
        first = self.last
        assert first is not None
        await self._until(lambda: value(self.last or first) >= value(first) + count, timeout, "did not make progress")
        last = self.last
        assert last is not None
        if last.errors or self.bad:
            raise GuestFailed("\n".join(self.bad))
        return last

    async def _until(self, done: Callable[[], bool], timeout: float, complaint: str) -> None:
        deadline = asyncio.get_running_loop().time() + timeout
        while not done():
            if self.bad or "Kernel panic" in self.text or asyncio.get_running_loop().time() > deadline:
                end = self.text[-2000:]
                raise GuestFailed(f"the guest {complaint} within {timeout:g} s; its serial line ends with:\n{end}")
            await asyncio.sleep(0.02)
