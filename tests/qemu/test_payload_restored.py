"""Restore of a guest without an operating system, with pages loaded on demand, on KVM if available."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pageferry.host.registry import Registry
from pageferry.pager.launcher import take_over
from tests.guest.machines import GuestParts
from tests.guest.restored import Restored, image_of_a_guest
from tests.guest.serial import Serial

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture(scope="module")
def payload_parts(payload_parts: GuestParts, states: Path) -> GuestParts:
    """Return the parts with saved states: on an emulated KVM, firmware takes 5 s of CPU time for each of two images."""
    return replace(payload_parts, states=states)


@pytest.fixture(scope="module")
def image(payload_parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_of_a_guest(payload_parts, tmp_path_factory.mktemp("image"))


@pytest.fixture
def restored(payload_parts: GuestParts, serial: Callable[[str], Serial], registry: Registry) -> Restored:
    return Restored("restored", payload_parts, serial("restored"))


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_payload_is_restored_with_every_page(restored: Restored, image: Path, eager: bool) -> None:
    async def run() -> None:
        await restored.start(image, eager=eager)
        await restored.serial.passes(2)
        await restored.arrived()
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


def test_payload_waits_for_a_killed_pager_and_continues_with_the_next(
    restored: Restored, payload_parts: GuestParts, tmp_path: Path
) -> None:
    image = image_of_a_guest(payload_parts, tmp_path, paused=True)

    async def run() -> None:
        # Resume the guest only after the pager is killed: on KVM, the guest could access all of its memory earlier.
        await restored.start(image, prefetch=False)
        await restored.kill_pager()
        await restored.run()
        await restored.serial.standstill()
        await take_over(restored.folder)
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())
