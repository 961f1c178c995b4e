"""Guest that pageferry commands migrate from one QEMU to the next, observed on its serial lines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pageferry.errors import NoSuchWorkload
from pageferry.host import processes
from pageferry.host.qmp import Monitor
from pageferry.host.registry import QemuEntry, Registry
from pageferry.workloads.qemu.guest import QemuWorkload
from tests import accounting
from tests.guest import booted
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial, Tick
from tests.kernel import moving
from tests.kernel.programs import DEADLINE, Program, wait_until

CHECKER = "ferry.mib=32 ferry.rate=4000 ferry.verify=32768 ferry.tick=50"
"""Options of the checker: 32 MiB, 4000 pages written per second, and four verifications of all pages per second."""


class Traveller:
    """Guest with the command line of its QEMU. The name of the guest ends in the number of its migrations."""

    def __init__(
        self,
        parts: GuestParts,
        folder: Path,
        *options: str,
        name: str = "guest",
        memory: str = "160M",
        checker: str | None = CHECKER,
        flags: Sequence[str] = (),
    ) -> None:
        self.parts = parts
        self.folder = folder
        self.options = options
        self.memory = memory
        self.checker = checker
        """Options of the checker; None: a machine without a guest system."""
        self.flags = flags
        """Options of both `pageferry run` and `pageferry receive`, such as `--hugetlb`."""
        self._name = name
        self.journeys = 0

    @property
    def name(self) -> str:
        """Current name of the guest."""
        return f"{self._name}-{self.journeys}"

    @property
    def next_name(self) -> str:
        """Name of the guest after the next migration."""
        return f"{self._name}-{self.journeys + 1}"

    @property
    def other_name(self) -> str:
        """Name of a receiver to which the guest is not migrated."""
        return f"{self._name}-other"

    @property
    def serial(self) -> Serial:
        """Current serial line of the guest."""
        return self._serial(self.name)

    @property
    def pid(self) -> int:
        """Pid of the QEMU process in which the guest is now."""
        return entry(self.name).pid

    def start(self) -> None:
        """Start the guest, and wait until its checker is running."""
        self.serial.path.unlink(missing_ok=True)
        if self.flags:
            words = ["run", self.name, "--detach", *self.flags, "--", *self.command(self.name)]
            call = [sys.executable, "-m", "pageferry", *words]
            subprocess.run(call, check=True, timeout=DEADLINE, capture_output=True)
            asyncio.run(self.serial.ready())
        else:  # as `pageferry run` does, but without the start of an interpreter
            asyncio.run(self._start())

    def command(self, name: str) -> list[str]:
        """Return the command line of QEMU for the guest `name`."""
        if self.checker is None:
            return self.parts.bare("-m", self.memory, *self.options)
        return self.parts.command(self._serial(name), *self.options, memory=self.memory, checker=self.checker)

    def receiver(
        self,
        *options: str,
        command: Sequence[str] | None = None,
        name: str | None = None,
        detach: bool = True,
        fault: str | None = None,
        **streams: Any,
    ) -> Program:
        """Start `pageferry receive` for the next migration. `command` replaces QEMU's command line.

        The receiver listens on TCP by default, because injected faults can drop TCP connections.
        """
        name = name or self.next_name
        self._serial(name).path.unlink(missing_ok=True)
        words = ["receive", name, *self.flags, *(["--detach"] if detach else []), "--output", "json"]
        words += [*(() if "--listen" in options else ("--listen", "127.0.0.1:0")), *options]
        words += ["--", *(command or self.command(name))]
        return Program("-m", "pageferry", *words, env=moving.environment(fault), **streams)

    def migrating(self, address: str, *options: str, fault: str | None = None, **streams: Any) -> Program:
        """Start `pageferry migrate` of the guest to the receiver at `address`."""
        return moving.migrating(self.name, address, *options, fault=fault, **streams)

    def move(self, *options: str) -> dict[str, Any]:
        """Migrate the guest, and check that the migration succeeds. Return the result."""
        with self.receiver() as there, self.migrating(moving.address_of(there), *options) as migration:
            lines = moving.all_until(migration, "migration")
            assert migration.wait() == 0
            received = moving.until(there, "received")
            assert there.wait() == 0
        self.arrived()
        accounting.check_source(lines)
        accounting.check_receiver(received)
        return lines[-1]

    def arrived(self) -> None:
        """Record that the guest runs at the destination.

        Check that its previous registry entry and QEMU no longer exist.
        """
        gone = self.name
        self.journeys += 1
        assert gone not in Registry().entries()
        self.alone()

    def runs(self) -> Tick:
        """Check that the guest runs and has found no incorrect page. Return its last tick."""
        return asyncio.run(self.serial.ticks(2))

    def verifies_everything(self) -> Tick:
        """Check that the guest runs and verifies all pages again. Return its last tick."""
        return asyncio.run(self.serial.passes(2))

    def alone(self) -> None:
        """Wait until the guest's QEMU is the only process of this run directory.

        Check that no other workload is registered.
        """
        wait_until(lambda: around() == {self.pid}, f"the exit of all processes but {self.name}: {around()}")
        assert list(Registry().entries()) == [self.name]

    def untouched(self) -> None:
        """Wait until no other process and no write trace of the guest is left.

        Check that no process traces the guest with ptrace(2).
        """
        self.alone()
        wait_until(lambda: moving.traces(self.pid) == 0, "the removal of the traces")
        status = Path(f"/proc/{self.pid}/status").read_text()
        assert "TracerPid:\t0\n" in status

    def allocated(self) -> int:
        """Return the bytes allocated for the memory files of the guest."""

        async def look() -> int:
            workload = await QemuWorkload.attach(self.name)
            try:
                return sum(os.fstat(region.fd).st_blocks * 512 for region in workload.regions)
            finally:
                workload.close()

        return asyncio.run(look())

    def resident(self) -> int:
        """Return the resident memory of the guest's QEMU, bytes."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Execute a QMP command in the monitor of the guest, and return the reply."""
        return asyncio.run(ask(self.name, command, **arguments))

    def end(self) -> None:
        """Kill all QEMU processes of the guest: more than one can exist after a failed test."""
        for name, found in Registry().entries().items():
            if name.startswith(f"{self._name}-"):
                processes.send_signal(found.pid, found.started, signal.SIGKILL)
                asyncio.run(processes.wait_for_end(found.pid, found.started))
                Registry().remove(name)

    async def _start(self) -> None:
        if self.checker is not None and self.parts.states is not None:
            details = {"memory": self.memory, "checker": self.checker}
            guest = await booted.start(self.name, self.parts, self.serial, *self.options, **details)
        else:
            guest = await QemuWorkload.start(self.name, self.command(self.name))
            if self.checker is not None:
                await self.serial.ready()
        guest.close()

    def _serial(self, name: str) -> Serial:
        return Serial(self.folder / f"{name}.serial")


@contextmanager
def travelling(parts: GuestParts, folder: Path, *options: str, **details: Any) -> Iterator[Traveller]:
    """Yield a guest whose checker is running, and kill the guest after the block.

    Check that no serial line reports an incorrect page.
    """
    traveller = Traveller(parts, folder, *options, **details)
    try:
        traveller.start()
        yield traveller
        assert [line for path in folder.glob("*.serial") for line in Serial(path).bad] == []
    finally:
        traveller.end()


def entry(name: str) -> QemuEntry:
    """Return the registry entry of a guest. Raises NoSuchWorkload if no guest has this name."""
    found = Registry().lookup(name)
    if not isinstance(found, QemuEntry):
        raise NoSuchWorkload(name)
    return found


async def ask(name: str, command: str, **arguments: Any) -> Any:
    """Execute a QMP command in the monitor of a guest, and return the reply."""
    async with await Monitor.open(entry(name).qmp_socket) as monitor:
        return await monitor.execute(command, **arguments)


def kill(name: str) -> None:
    """Kill the QEMU of the guest `name` with SIGKILL, and wait until it has exited."""
    found = entry(name)
    processes.send_signal(found.pid, found.started, signal.SIGKILL)
    wait_until(lambda: not found.alive, f"the exit of {name}")


def around() -> set[int]:
    """Return the pids of QEMU processes and guardians whose command lines contain the path of this run directory."""
    mark = os.fsencode(f"{Registry().path}/")
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and mark in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def listed() -> dict[str, str]:
    """Return the statuses of workloads by name, from `pageferry list`."""
    command = [sys.executable, "-m", "pageferry", "list", "--output", "json"]
    said = subprocess.run(command, check=True, timeout=DEADLINE, capture_output=True, text=True).stdout
    return {one["name"]: one["status"] for one in map(json.loads, said.splitlines())}
