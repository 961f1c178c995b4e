"""Tests of failures during migrations that copy disks between two hosts.

The guest keeps the versions of the blocks of two disks in memory, and verifies the blocks. On the host on which the
guest runs after the failure, its disks and its memory are of the same moment.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CACHE
from tests.guest import initrd
from tests.guest.disks import raw
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial
from tests.kernel.moving import Host
from tests.kernel.programs import Program
from tests.network import hosts
from tests.network.hosts import Network
from tests.network.journeys import DEEDS, Journey, mend, nothing_left
from tests.network.travellers import GuestTraveller, ended

CHECKER = "ferry.kib=128 ferry.rate=100 ferry.verify=400"
SIZE = 4 << 20
"""Size of a disk, bytes."""
SELECTION = [
    ("silence", "source.disks-begun"),
    ("cut", "source.disks-copied"),
    ("silence", "source.paused"),
    ("cut", "source.disks-finished"),
    ("source-agent", "source.paused"),
    ("destination-agent", "destination.disks-closed"),
    ("silence", "destination.decided"),
]
POINTS = (
    "source.disks-begun source.in-round source.disks-copied source.paused source.disks-finished source.ready "
    "source.commit-sent destination.disks-exported destination.in-round destination.disks-closed destination.decided"
).split()
OWNED = ("cut", "silence", "source-agent", "destination-agent")
"""Failures that leave the guest alive."""


def cases() -> list[tuple[str, str]]:
    """Return tuples of failure and fault point: all with FAULTS=all, otherwise a selection."""
    if os.environ.get("FAULTS") == "all":
        return [(deed, point) for deed in OWNED for point in POINTS]
    return SELECTION


class DiskTraveller(GuestTraveller):
    """Guest with two disks. Every receiver gets new, empty ones."""

    def receiver(self, host: Host, *options: str, **streams: Any) -> Program:
        """See `Traveller`."""
        for path in self._disks(self._next_serial()):
            path.unlink(missing_ok=True)
        return super().receiver(host, *options, **streams)

    def _command(self, serial: Serial) -> list[str]:
        drives = []
        for number, path in enumerate(self._disks(serial)):
            if not path.exists():
                raw(path, SIZE)
            drives += ["-drive", f"file={path},format=raw,if=ide,id=disk{number}"]
        return self._parts.command(serial, *drives, memory="128M", checker=CHECKER)

    @staticmethod
    def _disks(serial: Serial) -> list[Path]:
        return [serial.path.with_suffix(f".disk{number}") for number in range(2)]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    hosts.require()
    with Network(tmp_path_factory.mktemp("hosts")) as network:
        yield network


@pytest.fixture(autouse=True)
def _mended(network: Network) -> Iterator[None]:
    yield
    mend(network)


@pytest.fixture(scope="module")
def guest(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskTraveller]:
    qemu, kernel = shutil.which("qemu-system-x86_64"), CACHE / "guest/vmlinuz"
    if qemu is None or not kernel.exists() or shutil.which("rustc") is None:
        pytest.skip("no QEMU, no guest kernel or no rustc (`make system`)")
    parts = GuestParts(Path(qemu), kernel, initrd.build(CACHE / "guest/disk-checker", source=initrd.DISK_CHECKER))
    with ended(DiskTraveller(parts, tmp_path_factory.mktemp("guest"), network.hosts[0])) as guest:
        yield guest


@pytest.mark.parametrize(("deed", "point"), cases())
def test_guest_runs_with_its_disks_after_each_failure(
    network: Network, guest: DiskTraveller, tmp_path: Path, deed: str, point: str
) -> None:
    origin = guest.host
    target = next(host for host in network.hosts if host is not origin)
    options = ("--copy-disks", "--max-downtime", "5000")
    with Journey(network, guest, target, tmp_path, *options, fault=f"{point}=stop") as journey:
        journey.hold_or_end()
        DEEDS[deed](journey)
        journey.release()
        owner = journey.settle()
    said = journey.said("migrate") + journey.said("receive")
    assert "Traceback" not in said, said
    if point == "destination.decided":
        assert owner == "destination"
    else:
        assert owner == "source", said
    for host in network.hosts:
        nothing_left(host, *([guest.name] if host is guest.host else []))
    guest.verify()
