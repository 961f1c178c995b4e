"""Migrations of a Linux guest by `pageferry migrate` under write load, and refusals of different machines."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import FULL
from tests.guest import travel
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, travelling
from tests.kernel import moving
from tests.kernel.moving import MIB

MOVES = 10 if FULL else 3
"""Number of migrations in a row."""

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture(scope="module")
def guest(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traveller]:
    with travelling(parts, tmp_path_factory.mktemp("guest")) as traveller:
        yield traveller


def test_migration_result_reports_pages_times_and_huge_pages(guest: Traveller) -> None:
    before = guest.runs()
    result = guest.move()
    after = guest.verifies_everything()
    assert after.number > before.number
    assert after.writes > before.writes
    assert (result["status"], result["mode"]) == ("completed", "precopy")
    assert result["memory"] == 160 * MIB
    assert result["normal"] + result["duplicate"] + result["skipped"] >= result["memory"] // 4096
    assert 24 * MIB < result["transferred"] < 2 * result["memory"]
    assert 0 < result["downtime"] < result["total-time"]
    assert 0 < result["setup-time"] < result["total-time"]
    assert result["downtime"] == result["downtime-parts"]["total"]
    assert result["dirty-sync-count"] >= 2
    large = result["large-pages"]
    assert large["destination"] == large["source"] > 16
    assert large["fallbacks"] == 0
    populated = result["populated"]
    assert (populated["mode"], populated["failed"]) == ("all", 0)
    assert populated["large"] == large["source"]
    assert result["faults-after-resume"]["major"] == 0
    assert result["trace"]["granularity"] == "auto"
    guest.untouched()


def test_guest_is_migrated_repeatedly(guest: Traveller) -> None:
    first = guest.runs()
    for _ in range(MOVES):
        result = guest.move()
        assert result["large-pages"]["destination"] == result["large-pages"]["source"]
        guest.runs()
    last = guest.verifies_everything()
    assert last.writes > first.writes
    assert last.errors == 0


@pytest.mark.oldest_qemu
@pytest.mark.parametrize(
    "options",
    [
        "--codec lz4 --streams 2 --trace-granularity 4K --max-downtime 60000",
        "--codec zstd --trace-granularity 2M --populate hot --max-downtime 60000",
        "--large-pages ignore --populate none --streams 3 --max-downtime 60000",
    ],
)
def test_guest_is_migrated_with_options(guest: Traveller, options: str) -> None:
    result = guest.move(*options.split())
    if "--codec" in options:
        assert result["transferred"] < result["normal"] * 4096
    if "--populate" in options:
        assert result["populated"]["mode"] == options.split("--populate ")[1].split()[0]
    if "--trace" in options:
        assert result["trace"]["granularity"] == options.split("granularity ")[1].split()[0]
    guest.verifies_everything()


@pytest.mark.oldest_qemu
def test_guest_paused_by_its_user_is_paused_at_destination(guest: Traveller) -> None:
    guest.qmp("stop")
    guest.move()
    assert travel.listed() == {guest.name: "paused"}
    guest.qmp("cont")
    guest.verifies_everything()


@pytest.mark.oldest_qemu
def test_paused_guest_stays_paused_after_a_failed_migration(guest: Traveller) -> None:
    guest.qmp("stop")
    fault = "destination.in-round=kill"
    with guest.receiver(fault=fault) as there, guest.migrating(moving.address_of(there)) as migration:
        assert migration.wait() == 23
    guest.untouched()
    assert travel.listed() == {guest.name: "paused"}
    guest.qmp("cont")
    guest.runs()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("-m", "192M"), ["cannot receive", "160 MiB", "192 MiB"]),
        (("-machine", "q35"), ["the source has -machine pc-i440fx", "at the destination has pc-q35"]),
        (("-smp", "2"), ["the source has -smp 1", "at the destination has 2"]),
        (("-device", "virtio-balloon-pci"), ["the source has -device none", "has virtio-balloon-pci"]),
        (("-cpu", "max"), ["the source has -cpu qemu64", "at the destination has max"]),
        (("-cpu", "qemu64,-cx16"), ["the source has -cpu qemu64 with CPUID 1.ecx bit 13", "without them"]),
        (("-cpu", "qemu64,+aes"), ["the source has -cpu qemu64 without CPUID 1.ecx bit 25", "with them"]),
        (("-cpu", "qemu64,model=6"), ["the source has -cpu qemu64 with vendor", "model 107", "model 6"]),
    ],
    ids=["memory", "machine", "cpus", "devices", "cpu", "cpu-flag-missing", "cpu-flag-added", "cpu-signature"],
)
def test_migration_to_a_different_machine_names_the_difference(
    guest: Traveller, other: tuple[str, ...], words: list[str], tmp_path: Path
) -> None:
    command = [*guest.command(guest.next_name), *other]
    with guest.receiver(command=command, stderr=subprocess.PIPE) as there:
        with guest.migrating(moving.address_of(there), stderr=subprocess.PIPE) as migration:
            assert migration.wait() == 21
            assert migration.process.stderr is not None
            said = migration.process.stderr.read().decode()
            migration.process.stderr.close()
        for word in words:
            assert word in said
        there.process.terminate()
        there.wait()
        assert there.process.stderr is not None
        there.process.stderr.close()
    guest.untouched()
    guest.runs()
