"""Tests of waiting receivers: they exit with their QEMU, and keep listening after they refuse a source."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pageferry.host.registry import Registry
from tests.guest import travel
from tests.guest.disks import lock, locked, new_disk
from tests.guest.machines import GuestParts
from tests.guest.travel import travelling
from tests.kernel import moving

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("root")]


@pytest.mark.parametrize("detach", [True, False])
def test_receiver_ends_when_its_qemu_is_killed_while_it_waits(
    newest_parts: GuestParts, tmp_path: Path, detach: bool
) -> None:
    with travelling(newest_parts, tmp_path, memory="64M", checker=None) as guest:
        with guest.receiver(detach=detach) as there:
            moving.address_of(there)
            travel.kill(guest.next_name)
            assert there.wait() == 13
        assert guest.next_name not in Registry().entries()
        guest.move()


def test_receiver_ends_when_its_qemu_is_killed_in_a_round(newest_parts: GuestParts, tmp_path: Path) -> None:
    with travelling(newest_parts, tmp_path, memory="64M", checker=None) as guest:
        with guest.receiver() as there:
            fault = "source.in-round=stop"
            with guest.migrating(moving.address_of(there), fault=fault) as migration:
                moving.stopped(migration)
                travel.kill(guest.next_name)
                assert there.wait() == 13
                migration.process.send_signal(signal.SIGCONT)
                assert migration.wait() in (21, 23)
        guest.alone()
        assert guest.qmp("query-status")["running"]


@pytest.mark.parametrize("other", [("--memory", "128M"), ("-smp", "2"), ("-device", "virtio-rng-pci")])
def test_receiver_keeps_listening_after_it_refuses_a_source(
    newest_parts: GuestParts, tmp_path: Path, other: tuple[str, str]
) -> None:
    """The refused source differs in memory size, number of vCPUs or devices."""
    memory, options = (other[1], ()) if other[0] == "--memory" else ("64M", other)
    with (
        travelling(newest_parts, tmp_path, memory="64M", checker=None) as guest,
        travelling(newest_parts, tmp_path, *options, name="unlike", memory=memory, checker=None) as unlike,
        guest.receiver() as there,
    ):
        address = moving.address_of(there)
        for _ in range(2):
            with unlike.migrating(address) as migration:
                assert migration.wait() == 21
        with guest.migrating(address) as migration:
            assert migration.wait() == 0
        assert there.wait() == 0
        guest.journeys += 1
        unlike.end()
        guest.alone()


def test_guest_that_the_destination_cannot_resume_runs_at_source(parts: GuestParts, tmp_path: Path) -> None:
    """Another process has locked the disk, so the destination's QEMU refuses `cont`."""
    options = new_disk(tmp_path / "disk")
    with (
        travelling(parts, tmp_path, *options, memory="64M", checker=None) as guest,
        guest.receiver(fault="destination.decided=stop") as there,
        guest.migrating(moving.address_of(there), fault="source.commit-sent=stop") as migration,
    ):
        moving.stopped(migration)
        moving.stopped(there)
        with lock(tmp_path / "disk"):
            there.process.send_signal(signal.SIGCONT)
            assert there.wait() == 10
        migration.process.send_signal(signal.SIGCONT)
        assert migration.wait() == 21
        guest.alone()
        assert guest.qmp("query-status")["running"]
        assert locked(tmp_path / "disk")
