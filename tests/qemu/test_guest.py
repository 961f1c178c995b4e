"""Tests of pausing, saving, resuming and releasing a Linux guest, and of killing the guest's controller."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pageferry.errors import NameInUse, WorkloadError
from pageferry.host import proc, processes
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from pageferry.memory.regions import LARGE_PAGE
from pageferry.workloads.protocols import Migratable
from pageferry.workloads.qemu import device_state, ram
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest import booted
from tests.guest.machines import GuestParts
from tests.guest.restored import BUSY, OPTIONS
from tests.guest.serial import Serial

NAME = "guest"
CONTROLLER = Path(__file__).with_name("controller.py")


@dataclass
class Guest:
    """Guest of this module, with its serial line."""

    workload: QemuWorkload
    serial: Serial

    @property
    def qmp_socket(self) -> str:
        return str(Registry().path / NAME / "qmp.sock")


@pytest.fixture(scope="module")
def guest(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    serial = Serial(tmp_path_factory.mktemp("guest") / "serial")

    async def boot() -> QemuWorkload:
        return await booted.start(NAME, parts, serial, *OPTIONS, checker=BUSY)

    async def end() -> None:
        # Attach again: a failed test may have left the first QMP session in any state.
        await (await QemuWorkload.attach(NAME)).discard()

    workload = asyncio.run(boot())
    yield Guest(workload, serial)
    workload.close()
    asyncio.run(end())
    assert serial.bad == []
    assert not Registry().entries()
    assert not (Registry().path / NAME).exists()


async def settings(guest: Guest) -> tuple[Any, Any]:
    async with await Monitor.open(guest.qmp_socket) as monitor:
        capabilities = await monitor.execute("query-migrate-capabilities")
        return capabilities, await monitor.execute("query-migrate-parameters")


def test_guest_implements_the_workload_protocol(guest: Guest) -> None:
    workload: Migratable = guest.workload
    assert isinstance(workload, Migratable)
    assert workload.identity.kind == "qemu"
    assert workload.identity.details["cpus"] == 2
    assert str(workload.identity.details["machine"]).startswith("pc-i440fx-")


def test_memory_is_one_mapped_file(guest: Guest) -> None:
    (region,) = guest.workload.regions
    (segment,) = region.segments
    assert (region.name, region.length, region.page_size) == ("pageferry-ram", 256 << 20, 4096)
    assert (segment.pid, segment.length, segment.offset) == (guest.workload.pid, region.length, 0)
    assert os.fstat(region.fd).st_nlink == 0
    # The checker has filled 64 MiB. Most of the remaining 192 MiB have never been accessed.
    assert 64 << 20 < os.fstat(region.fd).st_blocks * 512 < 200 << 20
    assert not ram.misaligned(region)


@pytest.mark.usefixtures("root")
def test_memory_is_mapped_by_huge_pages(guest: Guest) -> None:
    (segment,) = guest.workload.regions[0].segments
    smaps = Path(f"/proc/{segment.pid}/smaps").read_text()
    vma = smaps[smaps.index(f"{segment.address:x}-") :]
    kib = next(int(line.split()[1]) for line in vma.splitlines() if line.startswith("ShmemPmdMapped:"))
    assert kib << 10 >= 16 * LARGE_PAGE


@pytest.mark.oldest_qemu
def test_guest_keeps_running_after_its_state_is_saved(guest: Guest) -> None:
    async def scenario() -> None:
        before = await settings(guest)
        for _ in range(2):
            await guest.workload.pause()
            assert not await guest.workload.running()
            state = device_state.SavedState.decode(await guest.workload.save_state())
            assert 100_000 < len(state.stream) < 8 << 20
            assert state.was_running
            await guest.workload.resume()
            assert await guest.workload.running()
            await guest.serial.ticks(2)
        assert await settings(guest) == before
        await guest.serial.passes(1)

    asyncio.run(scenario())


def test_guest_keeps_running_after_a_failed_save(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        await guest.workload.pause()
        with monkeypatch.context() as patch:
            patch.setattr(device_state, "MAX_STATE", 1000)
            with pytest.raises(WorkloadError, match="it contains guest memory"):
                await guest.workload.save_state()
        await guest.workload.resume()
        await guest.serial.ticks(2)
        await guest.workload.pause()
        assert await guest.workload.save_state()
        await guest.workload.resume()
        await guest.serial.ticks(2)

    asyncio.run(scenario())


@pytest.mark.oldest_qemu
def test_beginning_of_the_state_is_saved_while_the_guest_runs(guest: Guest) -> None:
    pieces: list[bytes] = []

    async def sink(piece: bytes) -> None:
        pieces.append(piece)

    async def scenario() -> None:
        before = await settings(guest)
        await guest.workload.pause_to_save(sink)
        assert await guest.workload.run_state() == "finish-migrate"
        early = b"".join(pieces)
        state = await guest.workload.save_state()
        assert b"".join(pieces) == early
        assert state.startswith(early)
        assert 100_000 < len(early) < len(state)
        await guest.workload.resume()
        assert await settings(guest) == before
        await guest.serial.ticks(2)

    asyncio.run(scenario())


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("fails", ["sink", "pre-switchover", "too long"])
def test_guest_keeps_running_after_a_failed_pause_to_save(
    guest: Guest, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sink fails while the guest runs, the caller resumes the guest without a save, or the state is too large."""

    async def sink(piece: bytes) -> None:
        if fails == "sink" and len(piece) > 1000:
            raise WorkloadError("the sink failed")

    async def scenario() -> None:
        before = await settings(guest)
        with monkeypatch.context() as patch:
            if fails == "too long":
                patch.setattr(device_state, "MAX_STATE", 1000)
            if fails == "pre-switchover":
                await guest.workload.pause_to_save(sink)
                assert not await guest.workload.running()
            else:
                with pytest.raises(
                    WorkloadError, match="the sink failed" if fails == "sink" else "it contains guest memory"
                ):
                    await guest.workload.pause_to_save(sink)
        await guest.workload.resume()
        assert await guest.workload.running()
        assert await settings(guest) == before
        await guest.serial.ticks(2)

    asyncio.run(scenario())


@pytest.mark.oldest_qemu
def test_guest_keeps_running_after_a_pause_to_save_that_is_cancelled_at_any_time(guest: Guest) -> None:
    """QEMU 7.2 would wait forever if its migration were cancelled just before the status `pre-switchover`."""

    async def sink(piece: bytes) -> None:
        pass

    async def scenario() -> None:
        before = await settings(guest)
        for milliseconds in range(24):
            pausing = asyncio.create_task(guest.workload.pause_to_save(sink))
            await asyncio.sleep(milliseconds / 1000)
            pausing.cancel()
            await asyncio.gather(pausing, return_exceptions=True)
            await guest.workload.resume()
            assert await guest.workload.running()
        assert await settings(guest) == before
        await guest.serial.ticks(2)

    asyncio.run(scenario())


def test_pause_to_save_of_a_paused_guest_saves_nothing_ahead(guest: Guest) -> None:
    async def sink(piece: bytes) -> None:
        pytest.fail(f"{len(piece)} bytes of a guest that its user has paused")

    async def scenario() -> None:
        async with await Monitor.open(guest.qmp_socket) as monitor:
            await monitor.execute("stop")
        await guest.workload.pause_to_save(sink)
        assert not device_state.SavedState.decode(await guest.workload.save_state()).was_running
        await guest.workload.resume()
        assert await guest.workload.run_state() == "paused"
        async with await Monitor.open(guest.qmp_socket) as monitor:
            await monitor.execute("cont")
        await guest.serial.ticks(1)

    asyncio.run(scenario())


def test_guest_paused_by_its_user_stays_paused(guest: Guest) -> None:
    async def scenario() -> None:
        async with await Monitor.open(guest.qmp_socket) as monitor:
            await monitor.execute("stop")
        await guest.workload.pause()
        assert not device_state.SavedState.decode(await guest.workload.save_state()).was_running
        await guest.workload.resume()
        assert not await guest.workload.running()
        async with await Monitor.open(guest.qmp_socket) as monitor:
            await monitor.execute("cont")
        await guest.serial.ticks(1)

    asyncio.run(scenario())


@pytest.mark.oldest_qemu
@pytest.mark.parametrize(
    ("controller_does", "runs_on"), [("pause", True), ("switch", True), ("save", True), ("commit", False)]
)
def test_guest_resumes_after_the_death_of_its_controller_unless_committed(
    guest: Guest, controller_does: str, runs_on: bool
) -> None:
    """If the controller is killed before its commit, a guardian resumes the guest.

    If it is killed after its commit, the guest stays paused.
    """
    command = [sys.executable, str(CONTROLLER), NAME, controller_does]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as controller:
        assert controller.stdout is not None
        guardian, started = map(int, controller.stdout.readline().split())
        controller.send_signal(signal.SIGKILL)

    async def scenario() -> None:
        async with asyncio.timeout(30):
            await processes.wait_for_end(guardian, started)
        assert await guest.workload.running() is runs_on
        await guest.workload.resume()
        await guest.serial.ticks(2)

    asyncio.run(scenario())


def test_attach_fails_while_another_client_uses_the_monitor(guest: Guest) -> None:
    async def scenario() -> None:
        async with await Monitor.open(guest.qmp_socket):
            with pytest.raises(WorkloadError, match="another client holds its only session"):
                await QemuWorkload.attach(NAME, timeout=0.3)
        (await QemuWorkload.attach(NAME)).close()

    asyncio.run(scenario())


def test_second_guest_with_the_same_name_is_refused(guest: Guest, parts: GuestParts) -> None:
    with pytest.raises(NameInUse, match=f"{NAME}: it is process {guest.workload.pid}"):
        asyncio.run(QemuWorkload.start(NAME, parts.bare()))
    assert proc.start_time(guest.workload.pid) is not None


def test_faults_of_the_vcpus_are_counted(guest: Guest) -> None:
    counted = guest.workload.faults()
    whole_process = int(Path(f"/proc/{guest.workload.pid}/stat").read_text().rsplit(")", 1)[1].split()[7])
    assert 0 < counted.minor <= whole_process
