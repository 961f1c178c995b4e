"""Tests of sharing between two guests: counts of duplicates equal those in Python, and zero pages are discarded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pageferry.host.registry import Registry
from pageferry.memory.regions import Region
from pageferry.sharing import api
from pageferry.sharing.scan import CLASSES
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial
from tests.kernel.lookalike import worth

PAGE = 4096
NAMES = ("twin-a", "twin-b")
SerialMaker = Callable[[str], Serial]


@pytest.fixture(scope="module")
def parts(newest_parts: GuestParts) -> GuestParts:
    """Return the parts of a guest with one QEMU only: the scan reads memory files, which every version has."""
    return newest_parts


def pages(region: Region) -> Iterator[bytes]:
    """Yield the pages of a region's file that are not holes."""
    position, end = region.file_offset, region.file_offset + region.length
    while position < end:
        try:
            position = os.lseek(region.fd, position, os.SEEK_DATA)
        except OSError:
            return
        stop = min(os.lseek(region.fd, position, os.SEEK_HOLE), end)
        for at in range(position, stop, PAGE):
            yield os.pread(region.fd, PAGE, at)
        position = stop


def numbered(contents: Iterator[bytes], known: dict[bytes, int]) -> list[int]:
    """Return a number for each page, in the form that `worth` expects.

    Pages with the same contents have the same number. Same-value filled pages have numbers of 0 or less.
    """

    def number(page: bytes) -> int:
        if page == page[:8] * (PAGE // 8):
            return -int.from_bytes(page[:8], "little")
        return known.setdefault(page, len(known) + 1)

    return [number(page) for page in contents]


@asynccontextmanager
async def guests(parts: GuestParts, serial: SerialMaker) -> AsyncIterator[list[QemuWorkload]]:
    """Start two guests from the same kernel and initrd, and terminate both after the block."""
    started: list[QemuWorkload] = []
    lines = [serial(name) for name in NAMES]
    try:
        for name, line in zip(NAMES, lines, strict=True):
            command = parts.command(line, memory="128M", checker="ferry.mib=16")
            started.append(await QemuWorkload.start(name, command))
        await asyncio.gather(*(line.ready() for line in lines))
        yield started
    finally:
        for guest in started:
            guest.close()
        for name in NAMES:
            if name in Registry().entries():
                await (await QemuWorkload.attach(name)).discard()
    assert [line.bad for line in lines] == [[], []]


@pytest.mark.usefixtures("root", "registry")
def test_duplicates_of_two_similar_guests_are_counted(parts: GuestParts, serial: SerialMaker) -> None:
    async def scenario() -> None:
        async with guests(parts, serial) as both:
            for guest in both:
                await guest.pause()
                await guest.commit()  # keeps the guest paused while another session scans its memory
            known: dict[bytes, int] = {}
            contents = [numbered(pages(guest.regions[0]), known) for guest in both]
            blocks = allocated(both)
            for guest in both:
                guest.close()
            found = await api.find_async(NAMES)
            expected, freed = worth(contents)
            assert {name: one.pages for name, one in found.classes.items()} == expected
            assert {name: one.reclaimable for name, one in found.classes.items()} == {
                name: count * PAGE for name, count in freed.items()
            }
            assert tuple(found.classes) == CLASSES
            assert found.memory == sum(map(len, contents)) * PAGE
            assert found.possible == expected["zero"] * PAGE
            both[:] = [await QemuWorkload.attach(name) for name in NAMES]
            assert allocated(both) == blocks, "the scan must not allocate memory"
            for guest in both:
                await guest.resume()

    asyncio.run(scenario())


@pytest.mark.usefixtures("root", "registry")
def test_zero_pages_of_running_guests_are_discarded(parts: GuestParts, serial: SerialMaker) -> None:
    async def scenario() -> None:
        async with guests(parts, serial) as both:
            before = allocated(both)
            for guest in both:
                guest.close()
            result = await api.share_async(NAMES, threshold=64)
            assert result.freed is not None
            assert result.estimated is not None
            assert result.freed > 0.9 * result.estimated > 8 << 20
            assert result.large_pages_broken == result.large_pages_chosen
            both[:] = [await QemuWorkload.attach(name) for name in NAMES]
            assert sum(allocated(both)) < sum(before) - 0.8 * result.freed
            lines = [serial(name) for name in NAMES]
            for line in lines:
                await line.passes(1)

    asyncio.run(scenario())


def allocated(both: list[QemuWorkload]) -> list[Any]:
    """Return the bytes allocated for each guest's memory file."""
    return [os.fstat(guest.regions[0].fd).st_blocks * 512 for guest in both]
