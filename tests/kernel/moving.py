"""Ledgers that move between processes, and the commands that move them; every wait has a deadline."""

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
    """Where programs run: by default among ourselves; otherwise see `tests.network.hosts`."""

    within: tuple[str, ...] = ()
    """Command that runs another one there."""
    run_directory: Path | None = None
    """None: that of the tests."""
    address: str | None = None
    """None: loopback."""

    @property
    def registry(self) -> Registry:
        """The workloads there."""
        return Registry(self.run_directory)

    @property
    def link(self) -> tuple[str, ...]:
        """Options of a migration that goes to such a host, or comes from one."""
        return ("--insecure",) if self.address is not None else ()

    @property
    def listening(self) -> tuple[str, ...]:
        """Options of a receiver there."""
        return ("--listen", f"{self.address or '127.0.0.1'}:0", *self.link)

    def program(self, *arguments: str, fault: str | None = None, **options: Any) -> Program:
        """`python ARGUMENTS` there."""
        return Program(*arguments, within=self.within, env=environment(fault, self), **options)


HERE = Host()


def environment(fault: str | None, host: Host = HERE) -> dict[str, str]:
    """Of a process that is to fail at a point: `POINT=ACTION`."""
    directory = {"PAGEFERRY_RUN_DIR": str(host.run_directory)} if host.run_directory is not None else {}
    return {**os.environ, **directory, **({"PAGEFERRY_FAULT": fault} if fault else {})}


@contextmanager
def ledger(name: str, host: Host = HERE, **setup: Any) -> Iterator[Program]:
    """A ledger in a process of its own."""
    setup = {"name": name, "size": 32 * MIB, "options": {"threads": 2, "rate": 8 * MIB}} | setup
    with host.program("-m", "pageferry.workloads.ledger_process", json.dumps(setup)) as program:
        assert program.json()["type"] == "ready"
        yield program


def receiver(name: str, *options: str, host: Host = HERE, **streams: Any) -> Program:
    """`pageferry receive --workload demo`, which says where it listens."""
    command = ("-m", "pageferry", "receive", name, "--workload", "demo", "--output", "json")
    return host.program(*command, *host.listening, *options, **streams)


def address_of(program: Program) -> str:
    """Where a receiver listens."""
    said = program.json()
    assert said["type"] == "listening"
    return str(said["address"])


def migrating(name: str, *options: str, host: Host = HERE, **streams: Any) -> Program:
    """`pageferry migrate`."""
    return host.program("-m", "pageferry", "migrate", name, *options, *host.link, "--output", "json", **streams)


def until(program: Program, kind: str) -> dict[str, Any]:
    """The next line of that type."""
    while True:
        said: dict[str, Any] = program.json()
        if said["type"] == kind:
            return said


def stopped(program: Program) -> None:
    """Wait until a process has stopped itself at its fault point."""
    wait_until(lambda: state(program.process.pid) == "T", "the stop")


def state(pid: int) -> str:
    """The letter that proc(5) has for it; `T` is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


async def _connected(name: str, host: Host) -> RemoteArena:
    entry = host.registry.lookup(name)
    assert isinstance(entry, ArenaEntry)
    return await RemoteArena.connect(entry.control_socket)


def status(name: str, host: Host = HERE) -> Status:
    """Where an arena is in its life."""

    async def ask() -> Status:
        arena = await _connected(name, host)
        try:
            return await arena.status()
        finally:
            arena.close()

    return asyncio.run(ask())


def writes(name: str, host: Host = HERE) -> int:
    """Pages that a ledger has written so far, read from its memory: its threads are not asked."""

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
    """It writes."""
    before = writes(name, host)
    wait_until(lambda: writes(name, host) > before, f"a write of {name}")


def stands_still(name: str, host: Host = HERE) -> bool:
    """It does not write, as far as one can tell in a while."""
    before = writes(name, host)
    return all(writes(name, host) == before for _ in range(30))


def traces(pid: int) -> int:
    """Mappings of a process that are registered with a userfaultfd (`uw`, `um`, `ui` in smaps)."""
    flags = [line.split()[1:] for line in Path(f"/proc/{pid}/smaps").read_text().splitlines() if "VmFlags" in line]
    return sum(bool({"uw", "um", "ui"} & set(found)) for found in flags)


def descriptors(pid: int) -> list[str]:
    """What a process has open, without the numbers of sockets and pipes that change."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(entry).split(":")[0])
    return sorted(found)


def runs_on(program: Program, before: list[str], name: str = "here") -> None:
    """As if nothing had happened: it runs, and has nothing on it or open that it had not `before` (`descriptors`)."""
    runs(name)
    assert status(name) is Status.RUNNING
    wait_until(lambda: traces(program.process.pid) == 0, "the end of the traces")
    wait_until(lambda: descriptors(program.process.pid) == before, "the end of all connections")


def is_intact(there: Program) -> None:
    """End a receiver of a ledger; it must have every write that was ever made."""
    there.process.terminate()
    assert until(there, "ledger")["intact"]


def ends_intact(program: Program, reason: str = "stopped") -> dict[str, Any]:
    """End a ledger's process; it must have every write that it ever made."""
    if reason == "stopped":
        program.process.terminate()
    end: dict[str, Any] = program.json()
    assert (end["type"], end["reason"], end["intact"]) == ("ledger", reason, True), end
    assert program.wait() == 0
    return end
