"""Tests of the announcement of guests on their networks, after arrivals and aborted migrations.

The network of a guest is a TCP connection to the test (`-netdev socket,connect=`), in which each frame follows its
length. The machine has no guest system, so all RARP packets are QEMU's.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.host.qmp import Monitor
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts
from tests.guest.travel import travelling
from tests.kernel import moving
from tests.kernel.programs import wait_until

pytestmark = [pytest.mark.usefixtures("root", "registry")]

MAC = "52:54:00:11:22:33"
RARP = bytes.fromhex("ffffffffffff 525400112233 8035")
"""Beginning of a RARP packet of the guest: receivers, sender, type."""


class Network:
    """Network of guests: it records the times of each guest's RARP packets. Guests are in the order of connections."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.guests: list[list[float]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def options(self) -> Sequence[str]:
        return (
            *("-netdev", f"socket,id=net,connect=127.0.0.1:{self.port}"),
            *("-device", f"virtio-net-pci,netdev=net,romfile=,mac={MAC}"),
        )

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                times: list[float] = []
                self.guests.append(times)
                threading.Thread(target=self._read, args=(connection, times), daemon=True).start()

    def _read(self, connection: socket.socket, times: list[float]) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as stream:
            while len(header := stream.read(4)) == 4:
                frame = stream.read(struct.unpack(">I", header)[0])
                if frame.startswith(RARP):
                    times.append(time.monotonic())


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    yield network
    network.close()


def test_guest_is_announced_after_aborted_migration_that_paused_it(
    newest_parts: GuestParts, network: Network, tmp_path: Path
) -> None:
    with travelling(newest_parts, tmp_path, *network.options, memory="64M", checker=None) as guest:
        fault = "destination.loaded=kill"
        with guest.receiver(fault=fault) as there, guest.migrating(moving.address_of(there)) as migration:
            assert migration.wait() == 23
        wait_until(lambda: len(network.guests[0]) == 5, "an announcement by the source")
        assert network.guests[1] == []  # never ran
        guest.untouched()


def test_guest_is_announced_by_the_guardian_of_a_killed_source(
    newest_parts: GuestParts, network: Network, tmp_path: Path
) -> None:
    with travelling(newest_parts, tmp_path, *network.options, memory="64M", checker=None) as guest:
        with (
            guest.receiver() as there,
            guest.migrating(moving.address_of(there), fault="source.ready=kill") as migration,
        ):
            assert migration.wait() == -signal.SIGKILL
        wait_until(lambda: len(network.guests[0]) == 5, "an announcement by the source")
        guest.untouched()


def test_migration_that_never_paused_the_guest_does_not_announce_it(
    newest_parts: GuestParts, network: Network, tmp_path: Path
) -> None:
    with travelling(newest_parts, tmp_path, *network.options, memory="64M", checker=None) as guest:
        with (
            guest.receiver() as there,
            guest.migrating(moving.address_of(there), fault="source.in-round=drop") as migration,
        ):
            assert migration.wait() == 23
        time.sleep(1)
        assert network.guests[0] == []


def test_guest_is_announced_after_arrival(newest_parts: GuestParts, network: Network, tmp_path: Path) -> None:
    with travelling(newest_parts, tmp_path, *network.options, memory="64M", checker=None) as guest:
        guest.move()
        # QEMU's announcement, which begins before the guest runs, and pageferry's.
        wait_until(lambda: len(network.guests[1]) == 10, "two announcements at the destination")
        assert network.guests[0] == []


def test_guest_is_announced_after_restore(newest_parts: GuestParts, network: Network, tmp_path: Path) -> None:
    command = newest_parts.bare("-m", "64M", *network.options)

    async def run() -> None:
        source = await QemuWorkload.start("source", command)
        await pageferry.checkpoint_async(source, tmp_path / "image")
        await source.discard()
        assert network.guests[0] == []
        workload, _ = await restore_guest("guest", tmp_path / "image", command)
        async with asyncio.timeout(30):
            while len(network.guests[1]) < 10:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await workload.discard()

    asyncio.run(run())


def test_announcement_uses_the_parameters_of_the_user(newest_parts: GuestParts, network: Network) -> None:
    async def run() -> None:
        workload = await QemuWorkload.start("guest", newest_parts.bare("-m", "64M", *network.options))
        async with await Monitor.open(workload.qmp_socket) as monitor:
            await monitor.execute("migrate-set-parameters", announce_rounds=2)
        await workload.announce()
        await asyncio.sleep(1)
        assert len(network.guests[0]) == 2
        await workload.discard()

    asyncio.run(run())
