"""Ledgers that are migrated between processes, and the commands that migrate them. Every wait has a timeout."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pageferry import _engine
from pageferry.host.registry import ArenaEntry, Registry
from pageferry.workloads.arena.control_socket.client import RemoteArena
from pageferry.workloads.lifecycle import Status
from tests.kernel.programs import Program, wait_until

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Host:
    """Host on which programs run. The default is this host; `tests.network.hosts` provides others."""

    within: tuple[str, ...] = ()
    """Command prefix that runs another command on the host."""
    run_directory: Path | None = None
    """Run directory; None: that of the tests."""
    address: str | None = None
    """IP address; None: loopback."""

    @property
    def registry(self) -> Registry:
        """Registry of the workloads on the host."""
        return Registry(self.run_directory)

    @property
    def link(self) -> tuple[str, ...]:
        """Options of a migration to or from the host."""
        return ("--insecure",) if self.address is not None else ()

    @property
    def listening(self) -> tuple[str, ...]:
        """Options of a receiver on the host."""
        return ("--listen", f"{self.address or '127.0.0.1'}:0", *self.link)

    def program(self, *arguments: str, fault: str | None = None, **options: Any) -> Program:
        """Start `python ARGUMENTS` on the host. `fault`: fault point and action (`POINT=ACTION`), if any."""
        return Program(*arguments, within=self.within, **{"env": environment(fault, self), **options})


HERE = Host()


def environment(fault: str | None, host: Host = HERE) -> dict[str, str]:
    """Return the environment of a process on a host. `fault`: fault point and action (`POINT=ACTION`), if any."""
    directory = {"PAGEFERRY_RUN_DIR": str(host.run_directory)} if host.run_directory is not None else {}
    return {**os.environ, **directory, **({"PAGEFERRY_FAULT": fault} if fault else {})}


@contextmanager
def ledger(name: str, host: Host = HERE, **setup: Any) -> Iterator[Program]:
    """Run a ledger in a separate process, and yield the process when the ledger is ready."""
    setup = {"name": name, "size": 32 * MIB, "options": {"threads": 2, "rate": 8 * MIB}} | setup
    with host.program("-m", "pageferry.demo.process", json.dumps(setup)) as program:
        assert program.json()["type"] == "ready"
        yield program


def receiver(name: str, *options: str, host: Host = HERE, **streams: Any) -> Program:
    """Start `pageferry receive --workload demo`, which receives the ledger as `name`."""
    command = ("-m", "pageferry", "receive", name, "--workload", "demo", "--output", "json")
    return host.program(*command, *host.listening, *options, **streams)


def address_of(program: Program) -> str:
    """Return the address on which a receiver listens."""
    said = program.json()
    assert said["type"] == "listening"
    return str(said["address"])


def migrating(name: str, *options: str, host: Host = HERE, **streams: Any) -> Program:
    """Start `pageferry migrate` for the workload `name`. `options`: address of the receiver, and further options."""
    link = () if "--take-back" in options else host.link  # a take-back does not connect to the destination
    return host.program("-m", "pageferry", "migrate", name, *options, *link, "--output", "json", **streams)


def until(program: Program, kind: str) -> dict[str, Any]:
    """Skip event lines up to the next line of type `kind`, and return that line."""
    return all_until(program, kind)[-1]


def all_until(program: Program, kind: str) -> list[dict[str, Any]]:
    """Return all event lines up to and including the next line of type `kind`."""
    said: list[dict[str, Any]] = [program.json()]
    while said[-1]["type"] != kind:
        said.append(program.json())
    return said


def stopped(program: Program) -> None:
    """Wait until a process has been stopped at its fault point."""
    wait_until(lambda: state(program.process.pid) == "T", "the process to stop")


def state(pid: int) -> str:
    """Return the state of a process, as in proc(5); `T`: stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


async def _connected(name: str, host: Host) -> RemoteArena:
    entry = host.registry.lookup(name)
    assert isinstance(entry, ArenaEntry)
    return await RemoteArena.connect(entry.control_socket)


def status(name: str, host: Host = HERE) -> Status:
    """Return the lifecycle status of an arena."""

    async def ask() -> Status:
        arena = await _connected(name, host)
        try:
            return await arena.status()
        finally:
            arena.close()

    return asyncio.run(ask())


def writes(name: str, host: Host = HERE) -> int:
    """Return the number of writes of a ledger, read from its memory, independently of its threads."""

    async def read() -> int:
        arena = await _connected(name, host)
        (region,) = arena.regions
        mapping = _engine.Mapping(region.fd, region.length)
        try:
            return sum(_engine.Ledger.attach(mapping, threads=0).writes())
        finally:
            arena.close()

    return asyncio.run(read())


def runs(name: str, host: Host = HERE) -> None:
    """Wait until the ledger `name` makes a further write."""
    before = writes(name, host)
    wait_until(lambda: writes(name, host) > before, f"a write of {name}")


def stands_still(name: str, host: Host = HERE) -> bool:
    """Return whether the ledger makes no write during 30 samples of its number of writes."""
    before = writes(name, host)
    return all(writes(name, host) == before for _ in range(30))


def traces(pid: int) -> int:
    """Return the number of a process's mappings that are registered with a userfaultfd (`uw`, `um`, `ui` in smaps)."""
    flags = [line.split()[1:] for line in Path(f"/proc/{pid}/smaps").read_text().splitlines() if "VmFlags" in line]
    return sum(bool({"uw", "um", "ui"} & set(found)) for found in flags)


def descriptors(pid: int) -> list[str]:
    """Return the targets of a process's open descriptors, sorted, without the numbers of sockets and pipes."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since the listing
            found.append(os.readlink(entry).split(":")[0])
    return sorted(found)


def runs_on(program: Program, before: list[str], name: str = "here") -> None:
    """Wait until a ledger runs without traces and with the descriptors `before` (see `descriptors`)."""
    runs(name)
    assert status(name) is Status.RUNNING
    wait_until(lambda: traces(program.process.pid) == 0, "the removal of the traces")
    wait_until(lambda: descriptors(program.process.pid) == before, "all connections to be closed")


def is_intact(there: Program) -> None:
    """Stop the receiver of a ledger, and check that no write was lost."""
    there.process.terminate()
    assert until(there, "ledger")["intact"]


def ends_intact(program: Program, reason: str = "stopped") -> dict[str, Any]:
    """Wait until the process of a ledger exits, check that no write was lost, and return the report of the process.

    If `reason` is `stopped`, send SIGTERM to the process first.
    """
    if reason == "stopped":
        program.process.terminate()
    end: dict[str, Any] = program.json()
    assert (end["type"], end["reason"], end["intact"]) == ("ledger", reason, True), end
    assert program.wait() == 0
    return end
