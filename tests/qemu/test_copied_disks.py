"""Tests of migrations that copy the disks of a guest to those of the destination."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import accounting
from tests.certificates import hosts
from tests.conftest import CACHE, FULL
from tests.guest import initrd
from tests.guest.disks import qcow2, raw
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, entry, kill, travelling
from tests.kernel import moving
from tests.kernel.programs import Program, wait_until
from tests.qemu import test_disks

pytestmark = pytest.mark.usefixtures("root")

MIB = 1 << 20
AREA = MIB // 2
"""Bytes of each disk that the checker writes to."""
CHECKER = f"ferry.kib={AREA >> 10} ferry.rate=200 ferry.verify=400"


@pytest.fixture(scope="session")
def disk_parts(qemu: Path, guest_kernel: Path) -> GuestParts:
    """Return the parts of a guest that checks two disks."""
    if shutil.which("rustc") is None:
        pytest.skip("no rustc, which builds the checker of the guest")
    return GuestParts(qemu, guest_kernel, initrd.build(CACHE / "guest/disk-checker", source=initrd.DISK_CHECKER))


class Disks:
    """Pairs of IDE disks, one for each host that a guest visits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self, host: str) -> list[Path]:
        """Return the paths of the disks of a host."""
        return [self.folder / f"{host}-{number}" for number in range(2)]

    def new(self, host: str, *more: str, size: int = 16 * MIB) -> tuple[str, ...]:
        """Create empty disks for a host. Return the options that attach them."""
        paths = [raw(path, size) for path in self.paths(host)]
        options = (",".join((f"file={path},format=raw,if=ide,id=disk{path.name[-1]}", *more)) for path in paths)
        return tuple(word for option in options for word in ("-drive", option))


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


@pytest.fixture
def guest(disk_parts: GuestParts, disks: Disks, tmp_path: Path) -> Iterator[Traveller]:
    """Yield a guest that writes to two disks and verifies them."""
    with travelling(disk_parts, tmp_path, *disks.new("a"), memory="128M", checker=CHECKER) as traveller:
        yield traveller


def bare(parts: GuestParts, folder: Path, *options: str, **details: Any) -> Any:
    """Return a context manager for a machine without a guest system."""
    return travelling(parts, folder, *options, memory="64M", checker=None, **details)


def filled(path: Path, size: int = 16 * MIB) -> Path:
    """Create a raw disk whose first half contains random data."""
    raw(path, size)
    with path.open("r+b") as file:
        file.write(os.urandom(size // 2))
    return path


@pytest.fixture
def idle(parts: GuestParts, disks: Disks, tmp_path: Path) -> Iterator[Traveller]:
    """Yield a machine without a guest system, with two disks that contain data."""
    options = disks.new("a")
    for path in disks.paths("a"):
        filled(path)
    with bare(parts, tmp_path, *options) as traveller:
        yield traveller


def moves(guest: Traveller, disks: Disks, host: str, *options: str) -> dict[str, Any]:
    """Migrate a guest with its disks to a host. Check that the disks of both hosts are equal, and that no job, node or
    export is left. Return the result."""
    ours = disks.paths("a" if guest.journeys == 0 else chr(ord("a") + guest.journeys))
    before = [path.read_bytes() for path in ours]
    guest.options = disks.new(host)
    result = guest.move("--copy-disks", *options)
    assert guest.qmp("query-status")["running"]
    assert [path.read_bytes() for path in disks.paths(host)] == before
    assert [path.read_bytes() for path in ours] == before
    clean(guest)
    return result


def clean(guest: Traveller) -> None:
    """Wait until no job, node or export of a copy is left in the QEMU of a guest."""

    def left() -> list[str]:
        nodes = [node["node-name"] for node in guest.qmp("query-named-block-nodes", flat=True)]
        jobs = [job["id"] for job in guest.qmp("query-jobs")]
        exports = [export["id"] for export in guest.qmp("query-block-exports")]
        return [name for name in (*nodes, *jobs, *exports) if "pageferry" in name]

    wait_until(lambda: left() == [], "the removal of all copies")


def unmoved(guest: Traveller) -> None:
    """Check that a guest keeps running at its source as before."""
    guest.untouched()
    assert guest.qmp("query-status")["running"]
    clean(guest)


@pytest.mark.every_qemu
def test_disks_are_copied(idle: Traveller, disks: Disks) -> None:
    result = moves(idle, disks, "b")
    assert [disk["path"] for disk in result["disks"]] == list(map(str, disks.paths("a")))
    assert result["disks-transferred"] >= 16 * MIB


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("mode", ["postcopy", "hybrid"])
def test_disks_are_complete_before_postcopy(idle: Traveller, disks: Disks, mode: str) -> None:
    moves(idle, disks, "b", "--mode", mode)


def test_disks_share_encryption_and_bandwidth_limit_of_pages(idle: Traveller, disks: Disks, tmp_path: Path) -> None:
    source, destination = map(str, hosts(tmp_path / "certificates"))
    before = [path.read_bytes() for path in disks.paths("a")]
    idle.options = disks.new("b")
    with idle.receiver("--tls", destination) as there:
        options = ("--copy-disks", "--tls", source, "--bandwidth", "8M")
        with idle.migrating(moving.address_of(there), *options) as migration:
            lines = moving.all_until(migration, "migration")
            assert migration.wait() == there.wait() == 0
    idle.arrived()
    accounting.check_source(lines)
    assert [path.read_bytes() for path in disks.paths("b")] == before
    # 16 MiB of data in the disks at 8 MiB/s
    assert lines[-1]["total-time"] > 1900
    progress = [line for line in lines if line["type"] == "disk-progress"]
    assert progress[-1]["ready"]
    assert all(line["total"] - line["done"] == line["remaining"] for line in progress)


IMPATIENT = """
import sys
from pageferry.cli.main import main
from pageferry.migration.transport import channel
channel.ANSWER = 0.1
sys.exit(main())
"""
"""Program that waits 3 s, instead of 120 s, for a message of its peer."""


def test_copy_may_take_longer_than_the_wait_for_a_message(idle: Traveller, disks: Disks) -> None:
    before = [path.read_bytes() for path in disks.paths("a")]
    idle.options = disks.new("b")
    words = ["receive", idle.next_name, "--detach", "--output", "json", "--listen", "127.0.0.1:0"]
    with (
        Program("-c", IMPATIENT, *words, "--", *idle.command(idle.next_name)) as there,
        idle.migrating(moving.address_of(there), "--copy-disks", "--bandwidth", "3M") as migration,
    ):
        assert moving.all_until(migration, "migration")[-1]["total-time"] > 4500
        assert migration.wait() == there.wait() == 0
    idle.arrived()
    assert [path.read_bytes() for path in disks.paths("b")] == before


def refused(guest: Traveller, options: Sequence[str], *arguments: str) -> str:
    """Migrate a guest to disks that the receiver refuses to write to. Return the reason."""
    said = test_disks.refused(guest, options, "--copy-disks", *arguments)
    clean(guest)
    return said


def test_unsuitable_disks_are_refused(idle: Traveller, disks: Disks) -> None:
    smaller = disks.new("small", size=8 * MIB)
    assert "disk0 of the source has 16777216 bytes, disk0 of guest-1 at the destination has 8388608 bytes" in refused(
        idle, smaller
    )
    options = disks.new("full")
    filled(disks.paths("full")[1])
    said = refused(idle, options)
    assert f"cannot copy a disk to {disks.paths('full')[1]} (disk1 of guest-1 at the destination): it contains" in said
    base, overlay = raw(disks.folder / "base", 16 * MIB), disks.folder / "overlay"
    file = qcow2(overlay, 16 * MIB, backing=base)
    other = disks.new("b")
    said = refused(idle, ("-drive", f"file={file},format=qcow2,if=ide,id=disk0", *other[2:]))
    assert f"it is an overlay over {base}" in said
    moves(idle, disks, "b")


def test_disks_may_have_another_format(idle: Traveller, disks: Disks, parts: GuestParts) -> None:
    paths = [qcow2(disks.folder / f"q{number}", 16 * MIB) for number in range(2)]
    words = (("-drive", f"file={path},format=qcow2,if=ide,id=disk{path.name[-1]}") for path in paths)
    idle.options = tuple(word for pair in words for word in pair)
    idle.move("--copy-disks")
    before = [path.read_bytes() for path in disks.paths("a")]
    idle.options = disks.new("b")
    idle.move("--copy-disks")
    assert [path.read_bytes() for path in disks.paths("b")] == before


def test_shared_disks_are_not_copied(parts: GuestParts, disks: Disks, tmp_path: Path) -> None:
    options, medium = disks.new("a"), raw(tmp_path / "medium")
    cd = ("-drive", f"file={medium},format=raw,if=ide,index=2,media=cdrom,id=cd,readonly=on")
    with bare(parts, tmp_path, *options, *cd) as guest:
        guest.options = (*disks.new("b")[:2], *options[2:], *cd)
        result = guest.move("--copy-disks")
        assert [disk["path"] for disk in result["disks"]] == [str(disks.paths("a")[0])]
        other = raw(tmp_path / "other")
        said = refused(guest, (*disks.new("c"), *(word.replace(str(medium), str(other)) for word in cd)))
        assert f"{other} (cd of guest-2 at the destination) is not {medium} of the source" in said


def test_guest_without_disks_can_be_moved(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path) as guest:
        assert guest.move("--copy-disks")["disks"] == []


def test_full_file_system_at_the_destination_leaves_the_guest_running(idle: Traveller, disks: Disks) -> None:
    small = disks.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "none", small], check=True)
    try:
        idle.options = Disks(small).new("b")
        with idle.receiver(stderr=subprocess.PIPE) as there:
            said = test_disks.fails(idle, moving.address_of(there), 10, "--copy-disks")
            heard = there.process.communicate()[1].decode()
            assert there.process.returncode == 21
        assert f"cannot copy the disk {disks.folder / 'a-'}" in said
        assert "No space left on device" in said
        assert f"contain an incomplete copy, and can be removed: {small / 'b-0'}, {small / 'b-1'}" in heard
        unmoved(idle)
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    moves(idle, disks, "b")


RETRIED = ("disks-copied", "ready", "loaded")
"""Fault points after which the guest is migrated again in every run. GUESTS=all adds all other fault points."""


def unmoved_and_movable(guest: Traveller, disks: Disks, point: str) -> None:
    """Check that a guest keeps running at its source as before, and that it can be migrated with its disks."""
    unmoved(guest)
    if FULL or point in RETRIED:
        moves(guest, disks, "b")


BEFORE_COMMIT = "disks-begun in-round between-rounds disks-copied paused disks-finished last-pages-sent ready".split()


@pytest.mark.parametrize("point", BEFORE_COMMIT)
def test_source_killed_before_commit_leaves_the_guest_on_its_disks(idle: Traveller, disks: Disks, point: str) -> None:
    idle.options = disks.new("b")
    with idle.receiver() as there:
        with idle.migrating(moving.address_of(there), "--copy-disks", fault=f"source.{point}=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        if point == "ready":
            there.process.terminate()  # the receiver waits for a recovery
        there.wait()
    unmoved_and_movable(idle, disks, point)


@pytest.mark.parametrize("point", "disks-exported in-round disks-closed loaded".split())
def test_destination_killed_before_commit_leaves_the_guest_on_its_disks(
    idle: Traveller, disks: Disks, point: str
) -> None:
    idle.options = disks.new("b")
    with idle.receiver(fault=f"destination.{point}=kill") as there:
        with idle.migrating(moving.address_of(there), "--copy-disks") as migration:
            assert migration.wait() in (10, 23)
        assert there.wait() == -signal.SIGKILL
    unmoved_and_movable(idle, disks, point)


@pytest.mark.parametrize("point", ["disks-begun", "disks-copied", "paused"])
def test_lost_link_leaves_the_guest_on_its_disks(idle: Traveller, disks: Disks, point: str) -> None:
    idle.options = disks.new("b")
    with idle.receiver() as there:
        with idle.migrating(moving.address_of(there), "--copy-disks", fault=f"source.{point}=drop") as migration:
            assert migration.wait() in (10, 23)
        assert there.wait() == 23
    unmoved_and_movable(idle, disks, point)


def test_killed_qemu_of_the_destination_leaves_the_guest_on_its_disks(idle: Traveller, disks: Disks) -> None:
    idle.options = disks.new("b")
    with idle.receiver() as there:
        options = ("--copy-disks", "--bandwidth", "2M")
        with idle.migrating(moving.address_of(there), *options) as migration:
            moving.until(migration, "disk-progress")
            kill(idle.next_name)
            assert migration.wait() in (10, 21, 23)
        assert there.wait() == 13
    unmoved(idle)
    moves(idle, disks, "b")


@pytest.mark.parametrize("point", ["disks-exported", "paused"])
def test_destination_disk_that_does_not_respond_fails_the_migration(idle: Traveller, disks: Disks, point: str) -> None:
    """Stop the QEMU of the destination before the source connects to its disks, or before the copies are completed."""
    idle.options = disks.new("b")
    faults = {
        "disks-exported": {"receiver": "destination.disks-exported=stop"},
        "paused": {"migrate": "source.paused=stop"},
    }
    with idle.receiver("--timeout", "8", fault=faults[point].get("receiver")) as there:
        options = ("--copy-disks", "--timeout", "4")
        with idle.migrating(
            moving.address_of(there), *options, fault=faults[point].get("migrate"), stderr=subprocess.PIPE
        ) as migration:
            waits = migration if point == "paused" else there
            moving.stopped(waits)
            os.kill(entry(idle.next_name).pid, signal.SIGSTOP)
            waits.process.send_signal(signal.SIGCONT)
            said = " ".join(migration.process.communicate()[1].decode().split())
            assert migration.process.returncode == 23, said
        assert "disks" in said
        assert "the destination has not replied within 4 s" in said
        assert idle.qmp("query-status")["running"]
        os.kill(entry(idle.next_name).pid, signal.SIGCONT)
        assert there.wait() == 21
    unmoved(idle)


@pytest.mark.oldest_qemu
def test_cancelled_migration_leaves_the_guest_on_its_disks(idle: Traveller, disks: Disks) -> None:
    idle.options = disks.new("b")
    with idle.receiver() as there:
        options = ("--copy-disks", "--bandwidth", "2M")
        with idle.migrating(moving.address_of(there), *options) as migration:
            moving.until(migration, "disk-progress")
            migration.process.send_signal(signal.SIGINT)
            assert migration.wait() == 130
        assert there.wait() == 21
    unmoved(idle)
    moves(idle, disks, "b")


def test_job_that_another_client_ends_fails_the_migration(idle: Traveller, disks: Disks) -> None:
    idle.options = disks.new("b")
    with idle.receiver() as there:
        options = ("--copy-disks", "--bandwidth", "2M")
        with idle.migrating(moving.address_of(there), *options, stderr=subprocess.PIPE) as migration:
            moving.until(migration, "disk-progress")
            idle.qmp("job-cancel", id="pageferry-disk-1")
            said = migration.process.communicate()[1].decode()
            assert migration.process.returncode == 10, said
        assert there.wait() == 21
    assert f"cannot copy the disk {disks.paths('a')[1]}" in " ".join(said.split())
    unmoved(idle)


def test_paused_guest_is_moved_with_its_disks(idle: Traveller, disks: Disks) -> None:
    idle.qmp("stop")
    before = [path.read_bytes() for path in disks.paths("a")]
    idle.options = disks.new("b")
    idle.move("--copy-disks")
    assert not idle.qmp("query-status")["running"]
    assert [path.read_bytes() for path in disks.paths("b")] == before
    idle.qmp("cont")
    assert idle.qmp("query-status")["running"]


def test_workload_without_disks_is_refused() -> None:
    with moving.ledger("here"):
        with moving.migrating("here", "127.0.0.1:1", "--copy-disks", stderr=subprocess.PIPE) as migration:
            said = migration.process.communicate()[1].decode()
            assert migration.process.returncode == 2
        assert "only guests have disks" in said


def test_writes_during_the_migration_are_in_the_copies(guest: Traveller, disks: Disks) -> None:
    before = guest.runs()
    guest.options = disks.new("b")
    result = guest.move("--copy-disks", "--bandwidth", "20M")
    assert guest.verifies_everything().errors == 0
    assert [disk["path"] for disk in result["disks"]] == list(map(str, disks.paths("a")))
    ours = [path.read_bytes() for path in disks.paths("a")]
    guest.options = disks.new("c")
    guest.move("--copy-disks")
    assert guest.verifies_everything().writes > before.writes
    assert [path.read_bytes() for path in disks.paths("a")] == ours
