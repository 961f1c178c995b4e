"""State of memory on huge pages, as reported by the kernel, and accesses to such memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pageferry._engine import LARGE_PAGE, Space
from pageferry.workloads.target import Target, process_target

T = TypeVar("T")


def large_mapped(pid: int, address: int, length: int) -> set[int]:
    """Return the addresses of the PMD-mapped huge pages in a range of a process's memory."""
    runs = Space(pid).large_mapped(address, length)
    return {at for start, end in runs for at in range(start, end, LARGE_PAGE)}


def frames(pid: int, address: int, pages: int) -> list[int]:
    """Return the page frame numbers of `pages` pages of a process; 0 if a page is not present. Requires root."""
    with Path(f"/proc/{pid}/pagemap").open("rb") as pagemap:
        pagemap.seek(address // 4096 * 8)
        words = pagemap.read(pages * 8)
    entries = [int.from_bytes(words[at : at + 8], "little") for at in range(0, len(words), 8)]
    return [entry & (1 << 55) - 1 if entry >> 63 else 0 for entry in entries]


def only(pid: int, address: int) -> Target:
    """Return a process as a target, restricted to the mapping at `address`."""
    target = process_target(pid)
    target.areas = tuple(area for area in target.areas if area.address <= address < area.end)
    return target


async def while_doing(access: Callable[[], object], work: Awaitable[T]) -> T:
    """Await `work`, and return its result. Call `access` repeatedly while `work` waits."""

    async def repeat() -> None:
        while True:
            access()
            await asyncio.sleep(0)

    task = asyncio.ensure_future(repeat())
    try:
        return await work
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
