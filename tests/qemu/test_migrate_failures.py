"""Agents and QEMUs killed at named points of a migration: the guest goes on where it belongs, and nothing leaks."""

from __future__ import annotations

import signal
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
"""Points before commit. What the destination has promised by the last three, it keeps until it is told otherwise."""
DESTINATION = "accepted in-round state-received loaded promised".split()
SEVERAL_ROUNDS = ("--max-downtime", "1")
"""Milliseconds: not to be reached at once."""


@pytest.fixture(scope="module")
def parts(newest_parts: GuestParts) -> GuestParts:
    """What is killed here is ours."""
    return newest_parts


@pytest.fixture(scope="module")
def guest(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traveller]:
    with travelling(parts, tmp_path_factory.mktemp("guest")) as traveller:
        yield traveller


@pytest.fixture
def before(guest: Traveller) -> list[str]:
    """What QEMU has open."""
    guest.alone()
    return moving.descriptors(guest.pid)


def stays(guest: Traveller, before: list[str]) -> None:
    """It runs on here as if nothing had happened, and nothing is left of the attempt."""
    guest.runs()
    guest.untouched()
    wait_until(lambda: moving.descriptors(guest.pid) == before, "the end of all connections")


def settle(guest: Traveller, *, owner: str) -> None:
    with moving.migrating(guest.name, "--recover") as recovery:
        assert moving.until(recovery, "recovery")["owner"] == owner
        assert recovery.wait() == 0


def ended(receiver: Program, codes: tuple[int, ...] = (23,)) -> None:
    assert receiver.wait() in codes


def settle_elsewhere(guest: Traveller, address: str, *, owner: str) -> None:
    """The receiver is gone: another one at its address has the answer."""
    with guest.receiver("--listen", address, name=guest.other_name) as another:
        moving.address_of(another)
        settle(guest, owner=owner)
        another.process.terminate()
        ended(another, (143,))


@pytest.mark.parametrize("point", SOURCE)
def test_source_agent_killed(guest: Traveller, before: list[str], point: str) -> None:
    with guest.receiver() as there:
        address = moving.address_of(there)
        with guest.migrating(address, *SEVERAL_ROUNDS, fault=f"source.{point}=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        guest.runs()
        if point in ("connected", "state-sent", "ready"):
            # It waits for another source, or for one that may be in doubt; or it is about to end by itself.
            there.process.terminate()
        if point == "recorded":
            settle(guest, owner="source")
        ended(there, (23, 143, -signal.SIGTERM))
    stays(guest, before)


@pytest.mark.parametrize("point", DESTINATION)
def test_destination_agent_killed(guest: Traveller, before: list[str], point: str) -> None:
    """Whatever it had loaded or promised: it has not decided, so what it leaves behind ends."""
    with guest.receiver(fault=f"destination.{point}=kill") as there:
        address = moving.address_of(there)
        with guest.migrating(address) as migration:
            code = migration.wait()
            # Once it had promised, the source may have sent Commit.
            assert code in ((23, 26) if point == "promised" else (23,))
        assert there.wait() == -signal.SIGKILL
    wait_until(lambda: travel.around() == {guest.pid}, "the end of the other QEMU")
    if code == 26:
        settle_elsewhere(guest, address, owner="source")
    stays(guest, before)


@pytest.mark.parametrize("point", ["accepted", "in-round", "state-received", "loaded", "promised", "commit-received"])
def test_destination_qemu_killed(guest: Traveller, before: list[str], point: str) -> None:
    """The agent beside it notices, and says so: the guest has not run there, so it is the source's."""
    with guest.receiver(fault=f"destination.{point}=stop") as there:
        with guest.migrating(moving.address_of(there)) as migration:
            moving.stopped(there)
            travel.kill(guest.next_name)
            there.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 21
        ended(there, (13,))
    stays(guest, before)


def test_guest_killed_between_two_rounds(parts: GuestParts, tmp_path: Path) -> None:
    """Its end is told by name, and the destination lets go."""
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


# -- after commit


def is_given_away(guest: Traveller) -> None:
    """The guest here is paused, given away."""
    assert travel.listed()[guest.name] == "paused"


def test_source_agent_killed_before_it_could_say_so(guest: Traveller, before: list[str]) -> None:
    with guest.receiver() as there:
        with guest.migrating(moving.address_of(there), fault="source.committed=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        is_given_away(guest)
        settle(guest, owner="source")
        ended(there)
    stays(guest, before)


def test_source_agent_killed_when_it_had_said_so(guest: Traveller) -> None:
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


def test_a_receiver_does_not_wait_for_ever_to_be_asked(guest: Traveller) -> None:
    """Its source was killed when it knew all; what it had not written down yet it learns from any receiver."""
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


def test_destination_qemu_killed_between_decision_and_cont(guest: Traveller, before: list[str]) -> None:
    """Nobody had told it to run, so the decision is withdrawn: the source has everything, and hears of it."""
    with guest.receiver(fault="destination.decided=stop") as there:
        with guest.migrating(moving.address_of(there)) as migration:
            moving.stopped(there)
            travel.kill(guest.next_name)
            there.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 21
        ended(there, (13,))
    stays(guest, before)
    guest.move()


def test_source_learns_of_a_withdrawn_decision_when_it_asks(guest: Traveller, before: list[str]) -> None:
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
def test_destination_agent_killed_when_it_had_decided(guest: Traveller, point: str) -> None:
    """The guest is there, and runs, with nobody but the guardian to see to that."""
    with guest.receiver(fault=f"destination.{point}=kill") as there:
        address = moving.address_of(there)
        with guest.migrating(address) as migration:
            assert migration.wait() == 26
        assert there.wait() == -signal.SIGKILL
    is_given_away(guest)
    wait_until(lambda: travel.listed()[guest.next_name] == "running", "that it runs there")
    settle_elsewhere(guest, address, owner="destination")
    guest.arrived()
    guest.verifies_everything()


def test_destination_agent_killed_before_it_decided(guest: Traveller, before: list[str]) -> None:
    with guest.receiver(fault="destination.commit-received=kill") as there:
        address = moving.address_of(there)
        with guest.migrating(address) as migration:
            assert migration.wait() == 26
        assert there.wait() == -signal.SIGKILL
    is_given_away(guest)
    wait_until(lambda: travel.around() == {guest.pid}, "the end of the other QEMU")
    settle_elsewhere(guest, address, owner="source")
    stays(guest, before)


# -- interrupted


@pytest.mark.parametrize("point", ["set-up", "in-round", "paused"])
def test_interrupted_migration_leaves_the_guest_running(guest: Traveller, before: list[str], point: str) -> None:
    with guest.receiver() as there:
        address = moving.address_of(there)
        with guest.migrating(address, *SEVERAL_ROUNDS, fault=f"source.{point}=stop") as migration:
            moving.stopped(migration)
            migration.process.send_signal(signal.SIGINT)
            migration.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 128 + signal.SIGINT
        ended(there, (21,))
    stays(guest, before)


def test_interrupted_receiver_leaves_the_guest_at_its_source(guest: Traveller, before: list[str]) -> None:
    with guest.receiver(detach=False, fault="destination.in-round=stop") as there:
        with guest.migrating(moving.address_of(there)) as migration:
            moving.stopped(there)
            there.process.send_signal(signal.SIGINT)
            there.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 21
        ended(there, (128 + signal.SIGINT,))
    stays(guest, before)


def test_interrupted_receiver_to_which_nobody_came(guest: Traveller, before: list[str]) -> None:
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
    """As one of `pageferry run` does."""
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
