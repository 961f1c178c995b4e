"""Tests that a migration requires the CPU model of the source at the destination."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, travelling
from tests.kernel import moving

pytestmark = [pytest.mark.usefixtures("root"), pytest.mark.every_qemu]

MAX = ("-cpu", "max")


@pytest.fixture(scope="module")
def guest(payload_on_tcg: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traveller]:
    with travelling(payload_on_tcg, tmp_path_factory.mktemp("guest"), *MAX, memory="64M") as traveller:
        yield traveller


def test_destination_cpu_with_fewer_features_is_refused(guest: Traveller) -> None:
    command = [*guest.command(guest.next_name), "-cpu", "qemu64"]
    with guest.receiver(command=command, stderr=subprocess.PIPE) as there:
        address = moving.address_of(there)
        with guest.migrating(address, fault="source.set-up=kill", stderr=subprocess.PIPE) as migration:
            assert migration.process.stderr is not None
            said = migration.process.stderr.read().decode()
            assert migration.wait() == 21, said
            migration.process.stderr.close()
        there.process.terminate()
        there.wait()
        assert there.process.stderr is not None
        there.process.stderr.close()
    assert "-cpu max" in said
    assert "qemu64" in said
    guest.untouched()
    guest.verifies_everything()


def test_guest_is_migrated_to_the_same_cpu(guest: Traveller) -> None:
    assert guest.move()["status"] == "completed"
    guest.verifies_everything()
