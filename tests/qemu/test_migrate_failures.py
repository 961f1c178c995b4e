"""Tests that exactly one host keeps the guest if a command or QEMU is killed at a fault point of a migration."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.host.registry import Registry
from tests.guest import travel
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, travelling
from tests.kernel import moving
from tests.kernel.programs import Program, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("root")]

SOURCE = "connected set-up in-round between-rounds paused last-pages-sent state-sent ready recorded".split()
"""Fault points of the source before Commit. At `ready` and `recorded`, the destination is prepared, and at `state-sent`
it may be. A prepared destination stays prepared until the source decides."""
DESTINATION = "accepted in-round state-received loaded promised".split()
SEVERAL_ROUNDS = ("--max-downtime", "50")
"""Option with a downtime limit of 50 ms, which the guest does not reach in the first round."""


@pytest.fixture(scope="module")
def parts(newest_parts: GuestParts) -> GuestParts:
    """Return the parts of a guest with one QEMU only: the killed commands do not depend on the QEMU version."""
    return newest_parts


@pytest.fixture(scope="module")
def guest(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traveller]:
    with travelling(parts, tmp_path_factory.mktemp("guest")) as traveller:
        yield traveller


@pytest.fixture
def before(guest: Traveller) -> list[str]:
    """Return the open descriptors of the guest's QEMU."""
    guest.alone()
    return moving.descriptors(guest.pid)


def stays(guest: Traveller, before: list[str]) -> None:
    """Check that the guest keeps running at the source, and that its QEMU has the same open descriptors as before."""
    guest.runs()
    guest.untouched()
    wait_until(lambda: moving.descriptors(guest.pid) == before, "all connections to be closed")


def settle(guest: Traveller, *, owner: str) -> None:
    with moving.migrating(guest.name, "--recover") as recovery:
        assert moving.until(recovery, "recovery")["owner"] == owner
        assert recovery.wait() == 0


def ended(receiver: Program, codes: tuple[int, ...] = (23,)) -> None:
    assert receiver.wait() in codes


def settle_elsewhere(guest: Traveller, address: str, *, owner: str) -> None:
    """Recover through another receiver, which listens on the address of the receiver that has exited."""
    with guest.receiver("--listen", address, name=guest.other_name) as another:
        moving.address_of(another)
        settle(guest, owner=owner)
        another.process.terminate()
        ended(another, (143,))


@pytest.mark.parametrize("point", SOURCE)
def test_guest_stays_at_source_if_its_command_is_killed_before_commit(
    guest: Traveller, before: list[str], point: str
) -> None:
    with guest.receiver() as there:
        address = moving.address_of(there)
        with guest.migrating(address, *SEVERAL_ROUNDS, fault=f"source.{point}=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        guest.runs()
        if point in ("connected", "state-sent", "ready"):
            # The receiver waits for another source or a recovery, or is about to exit.
            there.process.terminate()
        if point == "recorded":
            settle(guest, owner="source")
        ended(there, (23, 143, -signal.SIGTERM))
    stays(guest, before)


@pytest.mark.parametrize("point", DESTINATION)
def test_guest_stays_at_source_if_the_receiver_is_killed_before_its_decision(
    guest: Traveller, before: list[str], point: str
) -> None:
    """At these fault points the destination has not decided yet, so its QEMU is killed."""
    with guest.receiver(fault=f"destination.{point}=kill") as there:
        address = moving.address_of(there)
        with guest.migrating(address) as migration:
            code = migration.wait()
            # A destination killed at `promised` has sent Ready, so the source may have sent Commit.
            assert code in ((23, 26) if point == "promised" else (23,))
        assert there.wait() == -signal.SIGKILL
    wait_until(lambda: travel.around() == {guest.pid}, "the exit of the destination's QEMU")
    if code == 26:
        settle_elsewhere(guest, address, owner="source")
    stays(guest, before)


@pytest.mark.parametrize("point", ["accepted", "in-round", "state-received", "loaded", "promised", "commit-received"])
def test_guest_stays_at_source_if_the_destination_qemu_is_killed(
    guest: Traveller, before: list[str], point: str
) -> None:
    """The receiver reports that its QEMU has exited. The guest has not run there, so the source resumes the guest."""
    with guest.receiver(fault=f"destination.{point}=stop") as there:
        with guest.migrating(moving.address_of(there)) as migration:
            moving.stopped(there)
            travel.kill(guest.next_name)
            there.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 21
        ended(there, (13,))
    stays(guest, before)


def test_migration_of_a_guest_killed_between_rounds_fails(parts: GuestParts, tmp_path: Path) -> None:
    """The migration reports that the guest has exited, and the receiver kills its QEMU."""
    with travelling(parts, tmp_path, name="bare", memory="64M", checker=None) as bare, bare.receiver() as there:
        fault = "source.between-rounds=stop"
        with bare.migrating(moving.address_of(there), fault=fault) as migration:
            moving.stopped(migration)
            travel.kill(bare.name)
            migration.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 13
        ended(there, (21,))
        assert bare.name not in Registry().entries()
        assert bare.next_name not in Registry().entries()


# -- processes killed after the source's commit


def is_given_away(guest: Traveller) -> None:
    """Check that the guest is paused at the source, which has committed to the destination."""
    assert travel.listed()[guest.name] == "paused"


def test_guest_stays_at_source_if_its_command_is_killed_before_commit_is_sent(
    guest: Traveller, before: list[str]
) -> None:
    with guest.receiver() as there:
        with guest.migrating(moving.address_of(there), fault="source.committed=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        is_given_away(guest)
        settle(guest, owner="source")
        ended(there)
    stays(guest, before)


def test_guest_moves_if_the_source_command_is_killed_after_commit_is_sent(guest: Traveller) -> None:
    with guest.receiver() as there:
        with guest.migrating(moving.address_of(there), fault="source.commit-sent=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        moving.until(there, "received")
        is_given_away(guest)
        with guest.migrating("127.0.0.1:1") as again:
            assert again.wait() == 10
        settle(guest, owner="destination")
        assert there.wait() == 0
    guest.arrived()
    guest.verifies_everything()


def test_receiver_exits_after_its_timeout_without_a_recovery(guest: Traveller) -> None:
    """The source is killed before it records the reply. Any receiver on the destination host can repeat the reply."""
    with guest.receiver("--timeout", "1") as there:
        address = moving.address_of(there)
        with guest.migrating(address, fault="source.answered=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        moving.until(there, "received")
        assert there.wait() == 0
    is_given_away(guest)
    settle_elsewhere(guest, address, owner="destination")
    guest.arrived()
    guest.verifies_everything()


def test_decision_is_withdrawn_if_the_destination_qemu_is_killed_before_cont(
    guest: Traveller, before: list[str]
) -> None:
    """The guest has not run at the destination. The decision is withdrawn, and the source resumes the guest."""
    with guest.receiver(fault="destination.decided=stop") as there:
        with guest.migrating(moving.address_of(there)) as migration:
            moving.stopped(there)
            travel.kill(guest.next_name)
            there.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 21
        ended(there, (13,))
    stays(guest, before)
    guest.move()


def test_recovery_reports_a_withdrawn_decision(guest: Traveller, before: list[str]) -> None:
    with guest.receiver(fault="destination.decided=stop") as there:
        address = moving.address_of(there)
        with guest.migrating(address, fault="source.commit-sent=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        is_given_away(guest)
        moving.stopped(there)
        travel.kill(guest.next_name)
        there.process.send_signal(signal.SIGCONT)
        ended(there, (13,))
    settle_elsewhere(guest, address, owner="source")
    stays(guest, before)


@pytest.mark.parametrize("point", ["decided", "resumed"])
def test_guest_runs_at_destination_if_the_receiver_is_killed_after_its_decision(guest: Traveller, point: str) -> None:
    """The guardian resumes the guest at the destination after the receiver is killed."""
    with guest.receiver(fault=f"destination.{point}=kill") as there:
        address = moving.address_of(there)
        with guest.migrating(address) as migration:
            assert migration.wait() == 26
        assert there.wait() == -signal.SIGKILL
    is_given_away(guest)
    wait_until(lambda: travel.listed()[guest.next_name] == "running", "the guest to run at the destination")
    settle_elsewhere(guest, address, owner="destination")
    guest.arrived()
    guest.verifies_everything()


def test_guest_stays_at_source_if_the_receiver_is_killed_on_receipt_of_commit(
    guest: Traveller, before: list[str]
) -> None:
    with guest.receiver(fault="destination.commit-received=kill") as there:
        address = moving.address_of(there)
        with guest.migrating(address) as migration:
            assert migration.wait() == 26
        assert there.wait() == -signal.SIGKILL
    is_given_away(guest)
    wait_until(lambda: travel.around() == {guest.pid}, "the exit of the destination's QEMU")
    settle_elsewhere(guest, address, owner="source")
    stays(guest, before)


# -- interrupted commands


@pytest.mark.parametrize("point", ["set-up", "in-round", "paused"])
def test_interrupted_migration_leaves_the_guest_running_at_source(
    guest: Traveller, before: list[str], point: str
) -> None:
    with guest.receiver() as there:
        address = moving.address_of(there)
        with guest.migrating(address, *SEVERAL_ROUNDS, fault=f"source.{point}=stop") as migration:
            moving.stopped(migration)
            migration.process.send_signal(signal.SIGINT)
            migration.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 128 + signal.SIGINT
        ended(there, (21,))
    stays(guest, before)


def test_interrupted_receiver_leaves_the_guest_running_at_source(guest: Traveller, before: list[str]) -> None:
    with guest.receiver(detach=False, fault="destination.in-round=stop") as there:
        with guest.migrating(moving.address_of(there)) as migration:
            moving.stopped(there)
            there.process.send_signal(signal.SIGINT)
            there.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 21
        ended(there, (128 + signal.SIGINT,))
    stays(guest, before)


def test_interrupted_receiver_without_a_connection_leaves_no_guest(guest: Traveller, before: list[str]) -> None:
    with guest.receiver(detach=False) as there:
        moving.address_of(there)
        there.process.send_signal(signal.SIGINT)
        ended(there, (128 + signal.SIGINT,))
        assert guest.next_name not in Registry().entries()
        assert not (Registry().path / guest.next_name).exists()
    stays(guest, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_guest_received_in_the_foreground_ends_with_the_command(
    parts: GuestParts, tmp_path: Path, number: signal.Signals
) -> None:
    """The guest exits with `pageferry receive`, as it does with `pageferry run` in the foreground."""
    with travelling(parts, tmp_path, name="bare", memory="64M", checker=None) as bare:
        with bare.receiver(detach=False) as there:
            with bare.migrating(moving.address_of(there)) as migration:
                assert migration.wait() == 0
            moving.until(there, "received")
            assert travel.listed()[bare.next_name] == "running"
            there.process.send_signal(number)
            ended(there, (128 + number,))
        assert bare.name not in Registry().entries()
        assert bare.next_name not in Registry().entries()


def test_receiver_in_the_foreground_fails_when_its_guest_is_killed(parts: GuestParts, tmp_path: Path) -> None:
    with travelling(parts, tmp_path, name="bare", memory="64M", checker=None) as bare:
        with bare.receiver(detach=False, stderr=subprocess.PIPE) as there:
            with bare.migrating(moving.address_of(there)) as migration:
                assert migration.wait() == 0
            moving.until(there, "received")
            os.kill(travel.entry(bare.next_name).pid, signal.SIGKILL)
            assert there.process.stderr is not None
            assert b"was killed by SIGKILL" in there.process.stderr.read()
            assert there.wait() == 10
            there.process.stderr.close()
        assert bare.next_name not in Registry().entries()
