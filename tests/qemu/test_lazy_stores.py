"""Guests whose memory is fetched from an S3 store on demand, through a proxy that injects faults (S10)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.image_source import local_image_async
from pageferry.host.registry import Registry
from pageferry.pager import records
from pageferry.pager.launcher import take_over
from tests.guest.clones import Clone, status_of, until_gone
from tests.guest.machines import GuestParts
from tests.guest.restored import Restored, image_of_a_guest
from tests.guest.serial import Serial
from tests.stores.fault_proxy import FaultProxy
from tests.stores.fixtures import URL, proxy, server  # noqa: F401

MakeSerial = Callable[[str], Serial]


@pytest.fixture(scope="module")
def image(newest_parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of an image of a running guest."""
    return image_of_a_guest(newest_parts, tmp_path_factory.mktemp("image"))


@pytest.fixture
def url(proxy: FaultProxy, image: Path, tmp_path: Path) -> str:  # noqa: F811
    """Return the URL of the image in the store."""
    url = f"{URL}/{tmp_path.name}"
    pageferry.push_image(image, url)
    proxy.requests.clear()
    return url


@pytest.fixture
def guest(newest_parts: GuestParts, serial: MakeSerial, registry: Registry) -> Restored:
    """Return a guest that the test restores."""
    return Restored("lazy", newest_parts, serial("lazy"))


def test_guest_runs_after_its_index_is_read_and_survives_its_pager(
    guest: Restored,
    url: str,
    proxy: FaultProxy,  # noqa: F811
) -> None:
    async def run() -> None:
        async with local_image_async("image", url) as path:
            # The reference, then the parts of the manifest at the same time.
            assert list(dict.fromkeys(request.split("/")[3] for request in proxy.requests)) == ["images", "manifests"]
            proxy.delay = 0.02
            result = await guest.start(path, prefetch=False)
        assert result.deferred > 32 << 20
        await guest.serial.ticks(2)
        await guest.kill_pager()
        await take_over(guest.folder)
        await guest.serial.passes(2)
        await guest.end()

    asyncio.run(run())


def test_guest_waits_while_the_store_is_gone(guest: Restored, url: str, proxy: FaultProxy) -> None:  # noqa: F811
    async def run() -> None:
        async with local_image_async("image", url) as path:
            await guest.start(path, prefetch=False)
            proxy.gone = True
            await guest.logged("the workload waits for blocks")
            proxy.gone = False
            await guest.serial.passes(2)
            await guest.logged("blocks can be fetched again")
            status = await guest.status()
            assert status is not None
            assert status.failures == []
        await guest.end()

    asyncio.run(run())


def test_guest_pauses_at_a_page_that_is_damaged_in_the_store(
    guest: Restored,
    url: str,
    proxy: FaultProxy,  # noqa: F811
) -> None:
    async def run() -> None:
        async with local_image_async("image", url) as path:
            await guest.start(path, prefetch=False, paused=True)
            proxy.inject("GET", "packs/", "corrupt", 1 << 20)
            resuming = asyncio.create_task(guest.run())  # QEMU replies after the access if `cont` accesses memory
            await guest.logged("was damaged, truncated or replaced")
            await guest.logged("to continue with an intact copy")
            proxy.faults.clear()
            await take_over(guest.folder)
            await resuming
            async with asyncio.timeout(30):
                while '"pausing":true' in (guest.folder.path / records.RECORD).read_text():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert not await guest.workload.running()
            await guest.run()
            await guest.serial.passes(2)
        await guest.end()

    asyncio.run(run())


def test_clones_share_a_base_that_is_fetched(
    newest_parts: GuestParts,
    serial: MakeSerial,
    registry: Registry,
    url: str,
    proxy: FaultProxy,  # noqa: F811
) -> None:
    async def run() -> None:
        first, second = (Clone(name, newest_parts, serial(name)) for name in ("first", "second"))
        proxy.inject("GET", "packs/", "busy", 8)
        async with local_image_async("image", url) as path:
            await first.start(path)
            await first.serial.passes(1)
            os.kill((await status_of(path)).pager, signal.SIGKILL)
            await second.start(path, prefetch=True)
            for one in (first, second):
                await one.serial.passes(2)
                await one.workload.discard()
            await until_gone(path)

    asyncio.run(run())
