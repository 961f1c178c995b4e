"""Tests of guests that exit, reset, panic or are changed by another QMP client during a migration."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pageferry.host.qmp import Monitor
from tests.guest import travel
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller
from tests.kernel import moving
from tests.kernel.programs import Program, wait_until

pytestmark = pytest.mark.usefixtures("root")

ALL = os.environ.get("FAULTS") == "all"
RUNNING = ["source.between-rounds"] + ["source.greeted", "source.set-up", "source.in-round"] * ALL
"""Fault points of the source at which the guest runs."""
PAUSED = ["source.ready"] + ["source.last-pages-sent", "source.state-sent", "source.recorded"] * ALL
"""Fault points of the source at which the guest is paused and its state is saved, before Commit. Earlier in the pause,
QEMU rejects changes."""
THERE = ["destination.commit-received"] + ["destination.loaded", "destination.promised"] * ALL
"""Fault points of the destination before its decision."""

MACHINE = ("-device", "piix3-usb-uhci", "-device", "usb-mouse,id=mouse", "-device", "pvpanic")
STAYS = (*MACHINE, "-no-shutdown", "-no-reboot", "-action", "panic=pause")
FAILED, DIED, REFUSED = 10, 13, 21


class Watched(Traveller):
    """Guest with a second monitor, for a QMP client that is independent of pageferry."""

    def command(self, name: str) -> list[str]:
        return [*super().command(name), "-qmp", f"unix:{self._other(name)},server=on,wait=off"]

    def other(self, command: str, name: str | None = None, **arguments: Any) -> Any:
        """Execute a QMP command in the second monitor of the guest, and return the reply."""

        async def ask() -> Any:
            async with await Monitor.open(str(self._other(name or self.name))) as monitor:
                return await monitor.execute(command, **arguments)

        return asyncio.run(ask())

    @property
    def run_state(self) -> str:
        return str(self.other("query-status")["status"])

    def _other(self, name: str) -> Path:
        return self.folder / f"{name}.qmp"


Start = Callable[..., Watched]


@pytest.fixture
def start(payload_on_tcg: GuestParts, tmp_path: Path) -> Iterator[Start]:
    """Yield a function that boots guests with the given options. Kill the guests after the test."""
    guests: list[Watched] = []

    def boot(*options: str) -> Watched:
        guest = Watched(payload_on_tcg, tmp_path, *options, memory="64M", checker="ferry.mib=16")
        guests.append(guest)
        guest.start()
        return guest

    yield boot
    for guest in guests:
        guest.end()


def shut_down(guest: Watched) -> None:
    """Shut the guest down by a reset, which QEMU's option -no-reboot turns into a shutdown."""
    guest.other("system_reset")


def panic(guest: Watched) -> None:
    guest.other("human-monitor-command", command_line="o/b 0x505 1")


def add_device(guest: Watched) -> None:
    guest.other("device_add", driver="usb-kbd", id="added")


def remove_device(guest: Watched) -> None:
    guest.other("device_del", id="mouse")


@contextmanager
def interrupted(guest: Watched, point: str, *options: str) -> Iterator[tuple[Program, Program]]:
    """Start a migration, and wait until its source or its destination has stopped at a fault point.

    Yield the two commands. After the block, continue the stopped one, and wait until both have exited.
    """
    source, there = (point, None) if point.startswith("source") else (None, point)
    with guest.receiver(fault=f"{there}=stop" if there else None, detach=not there) as receiver:
        address = moving.address_of(receiver)
        with guest.migrating(address, *options, fault=f"{source}=stop" if source else None) as migration:
            stopped = migration if source else receiver
            moving.stopped(stopped)
            yield migration, receiver
            stopped.process.send_signal(signal.SIGCONT)
            migration.wait()
            receiver.wait()


def stayed(guest: Watched, migration: Program, *codes: int) -> None:
    """Check that the migration has failed, and that the source has the only copy of the guest."""
    assert migration.wait() in (codes or (FAILED,))
    guest.alone()


@pytest.mark.parametrize("point", RUNNING)
@pytest.mark.parametrize(("end", "state"), [(shut_down, "shutdown"), (panic, "guest-panicked")])
def test_guest_that_ends_during_migration_stays_at_source(
    start: Start, point: str, end: Callable[[Watched], None], state: str
) -> None:
    guest = start(*STAYS)
    with interrupted(guest, point) as (migration, _):
        end(guest)
        wait_until(lambda: guest.run_state == state, f"the run state {state}")
    stayed(guest, migration)
    assert guest.run_state == state


def test_guest_that_panics_before_postcopy_switchover_stays_at_source(start: Start) -> None:
    guest = start(*STAYS)
    with interrupted(guest, "source.set-up", "--mode", "postcopy") as (migration, _):
        panic(guest)
    stayed(guest, migration)
    assert guest.run_state == "guest-panicked"


def test_guest_that_has_panicked_is_migrated_in_that_state(start: Start) -> None:
    guest = start(*STAYS)
    panic(guest)
    wait_until(lambda: guest.run_state == "guest-panicked", "the panic")
    assert guest.move()["status"] == "completed"
    assert guest.run_state == "guest-panicked"
    assert travel.listed() == {guest.name: "paused"}


@pytest.mark.parametrize("point", RUNNING)
def test_guest_whose_qemu_exits_during_migration_leaves_no_copy(start: Start, point: str) -> None:
    guest = start(*MACHINE, "-no-reboot")
    pid = guest.pid
    with interrupted(guest, point) as (migration, _):
        shut_down(guest)
        wait_until(lambda: moving.state(pid) == "Z" if Path(f"/proc/{pid}").exists() else True, "the exit of QEMU")
    assert migration.wait() in (FAILED, DIED)
    wait_until(lambda: travel.around() == set(), "the exit of all processes")


# At `source.paused` the vCPUs are stopped, and QEMU has not written the device state yet.
@pytest.mark.parametrize("point", [*RUNNING, "source.paused"])
def test_guest_that_resets_during_migration_is_migrated(start: Start, point: str) -> None:
    guest = start(*MACHINE)
    with interrupted(guest, point) as (migration, _):
        guest.other("system_reset")
    assert migration.wait() == 0
    guest.arrived()
    guest.verifies_everything()


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("point", RUNNING)
def test_guest_paused_by_another_client_is_paused_at_destination(start: Start, point: str) -> None:
    guest = start(*MACHINE)
    with interrupted(guest, point) as (migration, _):
        guest.other("stop")
    assert migration.wait() == 0
    guest.arrived()
    assert travel.listed() == {guest.name: "paused"}
    guest.other("cont")
    guest.verifies_everything()


def test_guest_resumed_by_another_client_runs_at_destination(start: Start) -> None:
    guest = start(*MACHINE)
    guest.other("stop")
    with interrupted(guest, "source.between-rounds") as (migration, _):
        guest.other("cont")
    assert migration.wait() == 0
    guest.arrived()
    guest.verifies_everything()


# The source reads the devices for the last time while the destination loads the state.
@pytest.mark.parametrize("point", [*RUNNING, "source.state-sent", *["source.last-pages-sent"] * ALL])
@pytest.mark.parametrize("change", [add_device, remove_device])
def test_guest_whose_devices_change_during_migration_stays_at_source(
    start: Start, point: str, change: Callable[[Watched], None]
) -> None:
    guest = start(*MACHINE)
    with interrupted(guest, point) as (migration, _):
        change(guest)
    stayed(guest, migration, FAILED, REFUSED)  # the destination refuses a state with an additional device
    guest.verifies_everything()
    guest.untouched()


def test_device_that_is_added_just_before_the_commit_is_reported_as_lost(start: Start) -> None:
    guest = start(*MACHINE)
    with guest.receiver(detach=True) as receiver:
        address = moving.address_of(receiver)
        with guest.migrating(address, fault="source.ready=stop", stderr=subprocess.PIPE) as migration:
            moving.stopped(migration)
            add_device(guest)
            migration.process.send_signal(signal.SIGCONT)
            said = migration.process.communicate(timeout=60)[1].decode()
            assert migration.process.returncode == 0
            receiver.wait()
    assert "lost the devices added (usb-kbd), which were added while it was handed over" in " ".join(said.split())
    guest.arrived()
    guest.verifies_everything()


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("point", PAUSED)
@pytest.mark.parametrize("command", ["cont", "system_reset"])
def test_guest_resumed_or_reset_by_another_client_in_the_pause_stays_at_source(
    start: Start, point: str, command: str
) -> None:
    guest = start(*MACHINE)
    with interrupted(guest, point) as (migration, _):
        guest.other(command)
    stayed(guest, migration)
    guest.verifies_everything()
    guest.untouched()


@pytest.mark.parametrize("point", THERE)
@pytest.mark.parametrize("command", ["cont", "system_reset"])
def test_destination_changed_by_another_client_before_commit_is_refused(start: Start, point: str, command: str) -> None:
    guest = start(*MACHINE)
    with interrupted(guest, point) as (migration, _):
        guest.other(command, guest.next_name)
    stayed(guest, migration, REFUSED)
    guest.verifies_everything()
    guest.untouched()
