"""Tests of paused guests and shared disks: operations preserve the run state, disk locks and migration settings."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest import travel
from tests.guest.disks import locked, new_disk
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, travelling
from tests.kernel import moving
from tests.kernel.programs import DEADLINE, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("root")]

MARKER_AT = 32 << 20
"""Offset in guest memory to which firmware does not write, bytes."""


def bare(parts: GuestParts, folder: Path, *options: str) -> Any:
    """Return a context manager for a machine without a guest system, with a disk in `folder`."""
    return travelling(parts, folder, *new_disk(folder / "disk"), *options, memory="64M", checker=None)


def settings(guest: Traveller) -> tuple[Any, Any]:
    """Return the capabilities and parameters of QEMU's own migration."""
    return guest.qmp("query-migrate-capabilities"), guest.qmp("query-migrate-parameters")


def checkpoint(guest: Traveller, image: Path) -> None:
    command = [sys.executable, "-m", "pageferry", "checkpoint", guest.name, str(image)]
    subprocess.run(command, check=True, timeout=DEADLINE, capture_output=True)


def writes(guest: Traveller, disk: Path) -> None:
    """Write to the disk of a guest through QEMU's block layer, as the guest does."""
    before = disk.read_bytes()
    pattern = (before[0] + 1) % 256
    said = guest.qmp("human-monitor-command", command_line=f'qemu-io disk "write -P {pattern} 0 512"')
    assert "error" not in str(said).lower()
    assert disk.read_bytes()[:512] == bytes([pattern]) * 512


def saves_memory(guest: Traveller, file: Path) -> None:
    """Migrate a guest to a file with QEMU's own migration. Check that the file contains guest memory."""
    marker = os.urandom(4096)

    async def mark() -> None:
        workload = await QemuWorkload.attach(guest.name)
        os.pwrite(workload.regions[0].fd, marker, workload.regions[0].file_offset + MARKER_AT)
        workload.close()

    asyncio.run(mark())
    guest.qmp("migrate", uri=f"exec:cat >{file}")
    wait_until(lambda: guest.qmp("query-migrate")["status"] == "completed", "QEMU's own migration to complete")
    assert marker in file.read_bytes()


def said(*words: str, code: int = 0) -> str:
    """Run a pageferry command, and check that it exits with `code`. Return its output."""
    command = [sys.executable, "-m", "pageferry", *words]
    environment = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run(
        command, timeout=DEADLINE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def recover(guest: Traveller, *, owner: str) -> None:
    with moving.migrating(guest.name, "--recover") as recovery:
        assert moving.until(recovery, "recovery")["owner"] == owner
        assert recovery.wait() == 0


@pytest.mark.every_qemu
def test_checkpoints_of_a_paused_guest_leave_its_disks_locked(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path) as guest:
        guest.qmp("stop")
        before = guest.qmp("query-status"), settings(guest)
        assert locked(tmp_path / "disk")
        for _ in range(2):
            checkpoint(guest, tmp_path / "image")
            assert locked(tmp_path / "disk")
        guest.alone()
        assert (guest.qmp("query-status"), settings(guest)) == before
        assert "pageferry-" not in str([guest.qmp("query-named-block-nodes"), guest.qmp("query-jobs")])
        guest.qmp("cont")
        writes(guest, tmp_path / "disk")
        # QEMU closes removed descriptors at the end of a QMP session, but only while the guest runs.
        wait_until(lambda: "/memfd" not in moving.descriptors(guest.pid), "the snapshots' descriptors to be closed")


@pytest.mark.every_qemu
def test_migrated_paused_guest_has_its_disks_locked_at_the_destination(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path) as guest:
        before = settings(guest)
        guest.qmp("stop")
        for _ in range(2):
            checkpoint(guest, tmp_path / "image")
            guest.move()
            assert not guest.qmp("query-status")["running"]
            assert locked(tmp_path / "disk")
            assert settings(guest) == before
        guest.qmp("cont")
        writes(guest, tmp_path / "disk")
        guest.move()
        assert settings(guest) == before
        writes(guest, tmp_path / "disk")


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("point", ["paused", "last-pages-sent", "state-sent"])
def test_failed_migration_preserves_the_state_of_a_paused_guest(parts: GuestParts, tmp_path: Path, point: str) -> None:
    with bare(parts, tmp_path) as guest:
        guest.qmp("stop")
        before = guest.qmp("query-status"), settings(guest)
        with guest.receiver() as there:
            fault = f"source.{point}=drop"
            with guest.migrating(moving.address_of(there), fault=fault) as migration:
                assert migration.wait() == 23
            there.process.terminate()
            there.wait()
        guest.alone()
        assert locked(tmp_path / "disk")
        assert (guest.qmp("query-status"), settings(guest)) == before
        guest.move()


@pytest.mark.every_qemu
@pytest.mark.parametrize("paused", [True, False])
def test_recovery_restores_the_state_before_the_migration(parts: GuestParts, tmp_path: Path, paused: bool) -> None:
    with bare(parts, tmp_path) as guest:
        if paused:
            guest.qmp("stop")
        before = guest.qmp("query-status"), settings(guest)
        with guest.receiver() as there:
            with guest.migrating(moving.address_of(there), fault="source.committed=kill") as migration:
                assert migration.wait() == -signal.SIGKILL
            recover(guest, owner="source")
            assert there.wait() == 23
        guest.alone()
        assert locked(tmp_path / "disk")
        assert (guest.qmp("query-status"), settings(guest)) == before
        saves_memory(guest, tmp_path / "stream")


def test_recovery_from_a_record_of_an_older_release_resumes_the_guest(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path) as guest:
        with guest.receiver() as there:
            with guest.migrating(moving.address_of(there), fault="source.committed=kill") as migration:
                assert migration.wait() == -signal.SIGKILL
            record = Path(os.environ["PAGEFERRY_RUN_DIR"]) / guest.name / "migration.json"
            words = record.read_text()
            old = {name: value for name, value in json.loads(words).items() if name != "changes"}
            record.write_text(json.dumps({**old, "version": 3}))
            with moving.migrating(guest.name, "--recover") as recovery:
                assert recovery.wait() == 10
            del old["version"]
            record.write_text(json.dumps(old))
            recover(guest, owner="source")
            assert there.wait() == 23
        assert guest.qmp("query-status")["running"]


@pytest.mark.parametrize("point", ["set-up", "in-round", "paused", "last-pages-sent", "state-sent"])
def test_source_keeps_a_shared_disk_if_the_link_is_lost_before_commit(
    parts: GuestParts, tmp_path: Path, point: str
) -> None:
    with bare(parts, tmp_path) as guest:
        with guest.receiver() as there:
            with guest.migrating(moving.address_of(there), fault=f"source.{point}=drop") as migration:
                assert migration.wait() == 23
            assert guest.qmp("query-status")["running"]
            writes(guest, tmp_path / "disk")
            there.process.terminate()
            there.wait()
        assert locked(tmp_path / "disk")


@pytest.mark.every_qemu
def test_source_keeps_a_shared_disk_if_the_loaded_destination_hangs(parts: GuestParts, tmp_path: Path) -> None:
    """The receiver is stopped, so its QEMU still exists when the timeout of the source expires."""
    with bare(parts, tmp_path) as guest:
        with guest.receiver(fault="destination.loaded=stop") as there:
            with guest.migrating(moving.address_of(there), "--timeout", "2") as migration:
                moving.stopped(there)
                assert migration.wait() == 23
            assert guest.qmp("query-status")["running"]
            writes(guest, tmp_path / "disk")
            there.process.send_signal(signal.SIGCONT)
            there.process.terminate()  # the receiver may be prepared, and would then wait for a recovery
            there.wait()
        writes(guest, tmp_path / "disk")


def test_output_reports_that_a_guest_is_paused(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest:
        guest.qmp("stop")
        image = str(tmp_path / "image")
        assert "saving memory of the paused workload" in said("checkpoint", guest.name, image)
        assert "image, paused" in said("checkpoint", guest.name, image)
        assert "the guest was paused when it was saved" in said("image", "info", image)
        with guest.receiver() as there:
            moved = said("migrate", guest.name, moving.address_of(there))
            assert "still paused at" in moved
            assert moving.until(there, "received")["paused"]
            assert there.wait() == 0
        guest.arrived()
        guest.qmp("quit")
        wait_until(lambda: not locked(tmp_path / "disk"), "the exit of the first QEMU")
        guest.journeys += 1
        restored = said("restore", guest.name, image, "--detach", "--", *guest.command(guest.name))
        assert "paused, as it was saved" in restored
        assert "running," not in restored
        wait_until(lambda: guest.name in travel.listed(), "the guest to be registered")
        assert travel.listed()[guest.name] == "paused"


def test_failed_migration_reports_that_a_paused_guest_stays_paused(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest:
        guest.qmp("stop")
        refused = said("migrate", guest.name, "127.0.0.1:1", code=23)
        assert "is still paused" in refused
        assert "is still running" not in refused


def test_guest_paused_by_a_migration_of_another_program_is_reported(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path) as guest:
        guest.qmp("migrate", uri="exec:cat >/dev/null")
        wait_until(lambda: guest.qmp("query-migrate")["status"] == "completed", "QEMU's own migration to complete")
        assert "not by pageferry: it may run on another host" in " ".join(said("list").split())
        assert "not by pageferry: it may run on another host" in said("checkpoint", guest.name, str(tmp_path / "i"))
        guest.qmp("cont")
        assert "not by pageferry" not in said("list")


def test_restored_paused_guest_has_its_disks_locked(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path) as guest:
        guest.qmp("stop")
        checkpoint(guest, tmp_path / "image")
        guest.qmp("quit")
        wait_until(lambda: not locked(tmp_path / "disk"), "the exit of the first QEMU")
        words = ["restore", guest.next_name, str(tmp_path / "image"), "--detach", "--", *guest.command(guest.next_name)]
        subprocess.run([sys.executable, "-m", "pageferry", *words], check=True, timeout=DEADLINE, capture_output=True)
        guest.journeys += 1
        assert not guest.qmp("query-status")["running"]
        assert locked(tmp_path / "disk")
        guest.qmp("cont")
        writes(guest, tmp_path / "disk")


@pytest.mark.oldest_qemu
@pytest.mark.parametrize(
    ("saved", "option", "state"),
    [
        ("paused", "--resume", "running, although it was saved paused,"),
        ("running", "--paused", "paused, as requested,"),
    ],
)
def test_restore_chooses_the_run_state(parts: GuestParts, tmp_path: Path, saved: str, option: str, state: str) -> None:
    with bare(parts, tmp_path) as guest:
        if saved == "paused":
            guest.qmp("stop")
        before = settings(guest)
        checkpoint(guest, tmp_path / "image")
        guest.qmp("quit")
        wait_until(lambda: not locked(tmp_path / "disk"), "the exit of the first QEMU")
        guest.journeys += 1
        words = ["restore", guest.name, str(tmp_path / "image"), option, "--detach", "--", *guest.command(guest.name)]
        assert state in said(*words)
        assert guest.qmp("query-status")["status"] == state.split(",")[0]
        assert locked(tmp_path / "disk")
        assert settings(guest) == before
        guest.qmp("cont")
        writes(guest, tmp_path / "disk")


KILLED_IN_SAVE = """
import asyncio, os, signal, sys
from pageferry.workloads.qemu import snapshot
from pageferry.workloads.qemu.guest import QemuWorkload

async def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    snapshot._try = die  # called first when the snapshot is complete
    workload = await QemuWorkload.attach(sys.argv[1])
    await workload.pause()
    await workload.save_state()

asyncio.run(main())
"""


def test_guardian_removes_the_snapshot_of_a_killed_controller(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path) as guest:
        guest.qmp("stop")
        before = guest.qmp("query-status"), settings(guest), guest.qmp("query-named-block-nodes")
        done = subprocess.run([sys.executable, "-c", KILLED_IN_SAVE, guest.name], check=False, timeout=DEADLINE)
        assert done.returncode == -signal.SIGKILL
        guest.alone()
        assert (guest.qmp("query-status"), settings(guest), guest.qmp("query-named-block-nodes")) == before
        assert guest.qmp("query-jobs") == []
        assert locked(tmp_path / "disk")
        checkpoint(guest, tmp_path / "image")
