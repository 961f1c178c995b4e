"""Tests that a restore requires the machine of the image: machine type, CPU model, number of vCPUs, devices."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.errors import RestoreError
from pageferry.host.registry import Registry
from pageferry.memory.regions import Identity
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts

pytestmark = [pytest.mark.usefixtures("root"), pytest.mark.every_qemu]

MAX = ("-cpu", "max")


@pytest.fixture(scope="module")
def image(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an image of a machine with `-cpu max` that has never run. Return its path."""
    path = tmp_path_factory.mktemp("image") / "image"

    async def make() -> None:
        workload = await QemuWorkload.start("saved", parts.bare("-m", "64M", "-S", *MAX))
        await pageferry.checkpoint_async(workload, path)
        await workload.discard()

    asyncio.run(make())
    return path


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            ("-cpu", "qemu64"),
            "image has -cpu max, restored has qemu64; start the destination with the options of the source",
        ),
        (("-cpu", "max,-sse4.2"), "image has -cpu max with CPUID 1.ecx bit 20, restored has the same model without"),
        ((*MAX, "-smp", "2"), "image has -smp 1, restored has 2"),
        ((*MAX, "-device", "virtio-balloon-pci"), "image has -device none, restored has virtio-balloon-pci"),
        ((*MAX, "-machine", "q35"), "image has -machine pc-i440fx"),
    ],
    ids=["model", "flag", "cpus", "devices", "machine"],
)
def test_restore_into_a_different_machine_is_refused(
    parts: GuestParts, image: Path, registry: Registry, other: tuple[str, ...], words: str
) -> None:
    async def run() -> None:
        with pytest.raises(RestoreError) as refused:
            await restore_guest("restored", image, parts.bare("-m", "64M", "-S", *other))
        assert words in str(refused.value)

    asyncio.run(run())


def test_image_that_records_no_cpu_is_restored_with_a_warning(
    parts: GuestParts, tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """Images of earlier versions of pageferry do not record the CPU model."""

    def older(workload: QemuWorkload) -> Identity:
        found = workload._seen.machine.details
        return Identity("qemu", workload.name, {name: found[name] for name in ("qemu", "machine", "cpus", "devices")})

    async def run() -> None:
        workload = await QemuWorkload.start("saved", parts.bare("-m", "64M", "-S", *MAX))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QemuWorkload, "identity", property(older))
            await pageferry.checkpoint_async(workload, tmp_path / "image")
        await workload.discard()
        workload, _ = await restore_guest("restored", tmp_path / "image", parts.bare("-m", "64M", "-S", *MAX))
        await workload.discard()

    asyncio.run(run())
    assert "does not report its CPU model" in caplog.text
