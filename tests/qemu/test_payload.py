"""Migration and checkpoint of a guest without an operating system, on KVM if available."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.options import Mode
from pageferry.images.image import ImageFile
from pageferry.workloads.qemu.guest import QemuWorkload
from pageferry.workloads.qemu.kvm_prefault import VirtualMachine
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, travelling

pytestmark = pytest.mark.usefixtures("root")

BUSY = "ferry.mib=32 ferry.writes=8"


@pytest.fixture(scope="module")
def guest(payload_parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traveller]:
    with travelling(payload_parts, tmp_path_factory.mktemp("guest"), memory="64M", checker=BUSY) as traveller:
        yield traveller


def test_payload_runs_on_the_requested_accelerator(guest: Traveller) -> None:
    on_kvm = VirtualMachine.find(guest.pid) is not None
    assert on_kvm == (guest.parts.accel == "kvm")
    assert guest.qmp("query-kvm")["enabled"] == on_kvm


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "hybrid"])
def test_payload_is_migrated_twice(guest: Traveller, mode: str) -> None:
    for _ in range(2):
        before = guest.runs()
        assert guest.move("--mode", mode)["status"] == "completed"
        after = guest.verifies_everything()
        assert after.writes > before.writes
    guest.untouched()


@pytest.mark.parametrize("mode", ["stop", "lazy"])
def test_payload_keeps_running_after_a_checkpoint(guest: Traveller, tmp_path: Path, mode: Mode) -> None:
    async def save() -> None:
        workload = await QemuWorkload.attach(guest.name)
        try:
            await pageferry.checkpoint_async(workload, tmp_path / "image", mode=mode)
        finally:
            workload.close()

    asyncio.run(save())
    guest.verifies_everything()
    assert ImageFile(tmp_path / "image").verify() == []
