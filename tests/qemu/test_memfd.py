"""Guests whose memory is a memfd: newer QEMUs would save this memory together with the devices."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.errors import UnsupportedError, WorkloadDied
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial

TIMEOUT = 60.0
DEVICES = ("-device", "VGA", "-machine", "memory-backend=ram0")
MEMFD = "memory-backend-memfd,id=ram0,size=128M,share=on"


async def answers(qmp: str) -> None:
    """Wait until QEMU replies on its monitor."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            async with await Monitor.open(qmp):
                return
        except WorkloadDied:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


@pytest.fixture
def qmp(payload_on_tcg: GuestParts, tmp_path: Path) -> Iterator[str]:
    """Start a QEMU with a memfd, which runs the payload, and yield the path of its monitor."""
    path = str(tmp_path / "qmp.sock")
    options = ("-object", MEMFD, *DEVICES, "-qmp", f"unix:{path},server=on,wait=off")
    command = payload_on_tcg.command(Serial(tmp_path / "serial"), *options, memory="128M", checker="ferry.mib=16")
    process = subprocess.Popen(command)
    asyncio.run(answers(path))
    yield path
    process.kill()
    process.wait()


@pytest.fixture
def ram() -> Iterator[Path]:
    """Yield a temporary directory on tmpfs, for a file with guest memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.mark.every_qemu
@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_guest_on_a_memfd_is_saved_and_restored_from_a_file(
    qmp: str, payload_on_tcg: GuestParts, registry: Registry, tmp_path: Path, ram: Path, paused: bool
) -> None:
    file = f"memory-backend-file,id=ram0,size=128M,share=on,align=2M,mem-path={ram}/ram"

    async def run() -> None:
        source, serial = await QemuWorkload.adopt("memfd", qmp), Serial(tmp_path / "serial")
        await serial.passes(2)
        if paused:
            await pageferry.pause_async("memfd")
        await pageferry.checkpoint_async(source, tmp_path / "image")
        assert await source.run_state() == ("paused" if paused else "running")
        if not paused:
            await serial.passes(2)
        assert (tmp_path / "image").stat().st_size < 64 << 20
        await source.discard()
        restored = Serial(tmp_path / "restored")
        command = payload_on_tcg.command(restored, "-object", file, *DEVICES, memory="128M", checker="ferry.mib=16")
        guest, _ = await restore_guest("again", tmp_path / "image", command, eager=True)
        if paused:
            await pageferry.resume_async("again")
        await restored.passes(2)
        await guest.discard()

    asyncio.run(run())


def test_migration_of_a_guest_on_a_memfd_is_refused(qmp: str, registry: Registry, tmp_path: Path) -> None:
    async def run() -> None:
        guest = await QemuWorkload.adopt("memfd", qmp)
        with pytest.raises(UnsupportedError, match="cannot migrate memfd: its memory is a memfd"):
            await pageferry.migrate_async(guest, f"unix:{tmp_path}/receiver")
        await guest.discard()

    asyncio.run(run())
