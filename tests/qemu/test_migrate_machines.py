"""Migration of guests of several kinds: q35 with devices and a balloon, 4 GiB of memory, hugetlbfs, a newer QEMU."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, travelling
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import wait_until

pytestmark = pytest.mark.usefixtures("root")

Q35 = ("-machine", "q35", "-smp", "2", "-device", "virtio-balloon-pci", "-device", "virtio-rng-pci")


@pytest.fixture(scope="module")
def parts(parts: GuestParts) -> GuestParts:
    """Return the parts of a guest without saved states: each kind of guest is booted only once."""
    return replace(parts, states=None)


def balloon(guest: Traveller, mib: int) -> None:
    """Set the balloon so that the guest keeps `mib` MiB, and wait until the guest has this size."""
    guest.qmp("balloon", value=mib * MIB)
    wait_until(lambda: guest.qmp("query-balloon")["actual"] == mib * MIB, f"a balloon that leaves {mib} MiB")


@pytest.mark.oldest_qemu
def test_q35_guest_with_devices_and_balloon_is_migrated(parts: GuestParts, tmp_path: Path) -> None:
    """The balloon is inflated before the migration and between two rounds, and deflated at the destination."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    network = ("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n")
    devices = ("-drive", f"file={disk},format=raw,if=virtio", *network)
    with travelling(parts, tmp_path, *Q35, *devices, memory="224M") as guest:
        assert guest.runs().number
        balloon(guest, 192)
        with guest.receiver() as there:
            fault = "source.between-rounds=stop"
            with guest.migrating(moving.address_of(there), "--max-downtime", "50", fault=fault) as migration:
                moving.stopped(migration)
                balloon(guest, 160)
                migration.process.send_signal(signal.SIGCONT)
                assert moving.until(migration, "migration")["status"] == "completed"
            assert there.wait() == 0
        guest.arrived()
        guest.verifies_everything()
        assert guest.qmp("query-balloon")["actual"] == 160 * MIB
        balloon(guest, 224)
        assert guest.move()["memory"] == 224 * MIB
        guest.verifies_everything()


def test_untouched_memory_is_not_allocated(parts: GuestParts, tmp_path: Path) -> None:
    """The guest has 4 GiB in two guest-physical ranges, below and above the PCI hole."""
    with travelling(parts, tmp_path, memory="4G") as guest:
        result = guest.move()
        guest.verifies_everything()
        assert result["memory"] == 4096 * MIB
        assert result["skipped"] > 3 * 1024 * MIB // 4096
        assert result["transferred"] < 512 * MIB
        assert guest.allocated() < 512 * MIB
        assert guest.resident() < 1024 * MIB


@pytest.mark.usefixtures("huge_pages")
def test_migration_of_memory_on_hugetlbfs(parts: GuestParts, tmp_path: Path) -> None:
    """The memory is migrated to another file on hugetlbfs, and then to transparent huge pages."""
    with travelling(parts, tmp_path, flags=["--hugetlb"]) as guest:
        for flags in (["--hugetlb"], []):
            guest.flags = flags
            result = guest.move()
            guest.verifies_everything()
            assert result["large-pages"]["destination"] >= result["large-pages"]["source"] > 16
            assert result["populated"]["failed"] == 0


@pytest.fixture
def machine_type(qemu_system: Path) -> str:
    """Return the newest i440fx machine type of the QEMU in PATH, which is the older QEMU of the two."""
    command = [str(qemu_system), "-machine", "help"]
    said = subprocess.run(command, check=True, timeout=30, capture_output=True, text=True).stdout
    return next(line.split()[0] for line in said.splitlines() if line.startswith("pc-i440fx-"))


def test_guest_is_migrated_to_a_newer_qemu_and_back(
    qemu_system: Path, qemu_10: Path, guest_kernel: Path, checker_initrd: Path, machine_type: str, tmp_path: Path
) -> None:
    """Both QEMU versions support the machine type of the guest."""
    old, new = (GuestParts(qemu, guest_kernel, checker_initrd) for qemu in (qemu_system, qemu_10))
    with travelling(old, tmp_path, "-machine", machine_type) as guest:
        versions = []
        for guest.parts in (new, old):
            guest.move()
            guest.verifies_everything()
            versions.append(guest.qmp("query-version")["qemu"]["major"])
        assert versions[0] > versions[1]
