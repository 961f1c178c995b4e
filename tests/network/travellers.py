"""Workloads that are migrated between hosts: a ledger and a guest, with a common interface."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pageferry.host import processes
from pageferry.host.registry import AnyEntry
from tests.conftest import CACHE
from tests.guest import initrd
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial
from tests.kernel import moving
from tests.kernel.moving import MIB, Host
from tests.kernel.programs import DEADLINE, Program, wait_until

CHECKER = "ferry.mib=32 ferry.rate=4000 ferry.verify=32768 ferry.tick=50"


class Traveller(Protocol):
    """A workload and its current host. The name is the same on all hosts."""

    name: str
    host: Host

    def receiver(self, host: Host, *options: str, **streams: Any) -> Program:
        """Start `pageferry receive` for the workload on another host."""

    def arrived(self, host: Host, receiver: Program) -> None:
        """Record that the workload now runs on `host`. For a ledger, check that its last process has lost no write."""

    def runs(self) -> None:
        """Check that the workload makes progress and has found no incorrect page."""

    def verify(self) -> None:
        """Check all memory of the workload. The check may stop the workload."""

    def kill(self) -> None:
        """Kill the process that runs the workload with SIGKILL."""

    def end(self) -> None:
        """Stop the workload on all hosts, even after a failed test."""


T = TypeVar("T", bound=Traveller)


class LedgerTraveller:
    """Ledger that starts in a separate process, and then runs in the processes of receivers."""

    def __init__(self, host: Host, name: str = "ledger", **setup: Any) -> None:
        self.name = name
        self.host = host
        setup = {"name": name, "size": 32 * MIB, "options": {"threads": 2, "rate": 8 * MIB}, "exact": True} | setup
        self._program = host.program("-m", "pageferry.demo.process", json.dumps(setup))
        try:
            assert self._program.json()["type"] == "ready"
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        """Pid of the process that holds the ledger."""
        return self._program.process.pid

    def receiver(self, host: Host, *options: str, **streams: Any) -> Program:
        """See `Traveller`."""
        return moving.receiver(self.name, *options, host=host, **streams)

    def arrived(self, host: Host, receiver: Program) -> None:
        """See `Traveller`."""
        gone, self._program, self.host = self._program, receiver, host
        with gone:
            if gone.process.poll() != -signal.SIGKILL:
                assert moving.until(gone, "ledger")["intact"]
                assert gone.wait() == 0

    def runs(self) -> None:
        """See `Traveller`."""
        moving.runs(self.name, self.host)

    def verify(self) -> None:
        """See `Traveller`; the ledger is stopped."""
        self._program.process.terminate()
        assert moving.until(self._program, "ledger")["intact"]
        assert self._program.wait() == 0

    def kill(self) -> None:
        """See `Traveller`."""
        self._program.kill()

    def end(self) -> None:
        """See `Traveller`."""
        self._program.__exit__(None, None, None)


class GuestTraveller:
    """A QEMU guest that runs the checker."""

    def __init__(self, parts: GuestParts, folder: Path, host: Host, name: str = "guest") -> None:
        self.name = name
        self.host = host
        self._parts = parts
        self._folder = folder
        self._journeys = 0
        self._hosts = {host.run_directory: host}
        words = ("-m", "pageferry", "run", name, "--detach", "--", *self._command(self.serial))
        said = folder / f"{name}.stderr"
        try:
            with open(said, "wb") as stderr, host.program(*words, stderr=stderr) as starting:
                assert starting.wait() == 0, said.read_text()
            asyncio.run(self.serial.ready())
        except BaseException:
            self.end()
            raise

    @property
    def serial(self) -> Serial:
        """Serial line of the current QEMU."""
        return Serial(self._folder / f"{self.name}-{self._journeys}.serial")

    @property
    def pid(self) -> int:
        """Pid of the current QEMU."""
        return self.host.registry.lookup(self.name).pid

    def receiver(self, host: Host, *options: str, **streams: Any) -> Program:
        """See `Traveller`."""
        self._hosts[host.run_directory] = host
        serial = self._next_serial()
        serial.path.unlink(missing_ok=True)
        words = ("receive", self.name, "--detach", "--output", "json", *host.listening, *options)
        return host.program("-m", "pageferry", *words, "--", *self._command(serial), **streams)

    def arrived(self, host: Host, receiver: Program) -> None:
        """See `Traveller`."""
        self.host = host
        self._journeys += 1
        with receiver:
            receiver.process.wait(DEADLINE)

    def runs(self) -> None:
        """See `Traveller`."""
        asyncio.run(self.serial.ticks(2, DEADLINE))

    def verify(self) -> None:
        """See `Traveller`."""
        asyncio.run(self.serial.passes(2))

    def kill(self) -> None:
        """See `Traveller`."""
        _kill(self.host.registry.lookup(self.name))

    def end(self) -> None:
        """See `Traveller`."""
        for host in self._hosts.values():
            if (found := host.registry.entries().get(self.name)) is not None:
                _kill(found)

    def _next_serial(self) -> Serial:
        return Serial(self._folder / f"{self.name}-{self._journeys + 1}.serial")

    def _command(self, serial: Serial) -> list[str]:
        return self._parts.command(serial, memory="160M", checker=CHECKER)


def guest_parts() -> GuestParts | None:
    """Return the parts of a guest with QEMU 10, or with the QEMU in PATH; None if a part is missing."""
    newest, system = CACHE / "qemu-10/bin/qemu-system-x86_64", shutil.which("qemu-system-x86_64")
    qemu = newest if newest.exists() else Path(system) if system else None
    kernel = CACHE / "guest/vmlinuz"
    if qemu is None or not kernel.exists() or shutil.which("rustc") is None:
        return None
    return GuestParts(qemu, kernel, initrd.build(CACHE / "guest/checker"))


@contextmanager
def ended(traveller: T) -> Iterator[T]:
    """Stop the workload at the end of the block."""
    try:
        yield traveller
    finally:
        traveller.end()


def inhabitants(host: Host) -> dict[int, str]:
    """Return the command lines of the processes of a host, by pid.

    A process belongs to the host if its environment names the run directory of the host. Zombies are left out, because
    they have no environment.
    """
    mark = b"PAGEFERRY_RUN_DIR=" + os.fsencode(str(host.run_directory)) + b"\0"
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and mark in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    return found


def _kill(found: AnyEntry) -> None:
    processes.send_signal(found.pid, found.started, signal.SIGKILL)
    wait_until(lambda: not found.alive, f"the end of process {found.pid}")
