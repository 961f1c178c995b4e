"""Ledgers that move between processes, and the commands that move them; every wait has a deadline."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pageferry import _engine
from pageferry.host.registry import ArenaEntry, Registry
from pageferry.workloads.control.client import RemoteArena
from pageferry.workloads.lifecycle import Status
from tests.kernel.programs import Program, wait_until

MIB = 1 << 20


def environment(fault: str | None) -> dict[str, str]:
    """Of a process that is to fail at a point: `POINT=ACTION`."""
    return {**os.environ, "PAGEFERRY_FAULT": fault} if fault else dict(os.environ)


@contextmanager
def ledger(name: str, **setup: Any) -> Iterator[Program]:
    """A ledger in a process of its own."""
    setup = {"name": name, "size": 32 * MIB, "options": {"threads": 2, "rate": 8 * MIB}} | setup
    with Program("-m", "pageferry.workloads.ledger_process", json.dumps(setup)) as program:
        assert program.json()["type"] == "ready"
        yield program


def receiver(name: str, *options: str, fault: str | None = None) -> Program:
    """`pageferry receive --workload demo`, which says where it listens."""
    command = ("-m", "pageferry", "receive", name, "--workload", "demo", "--output", "json", *options)
    return Program(*command, env=environment(fault))


def address_of(program: Program) -> str:
    """Where a receiver listens."""
    said = program.json()
    assert said["type"] == "listening"
    return str(said["address"])


def migrating(name: str, *options: str, fault: str | None = None, **streams: Any) -> Program:
    """`pageferry migrate`."""
    command = ("-m", "pageferry", "migrate", name, *options, "--output", "json")
    return Program(*command, env=environment(fault), **streams)


def until(program: Program, kind: str) -> dict[str, Any]:
    """The next line of that type."""
    while True:
        said: dict[str, Any] = program.json()
        if said["type"] == kind:
            return said


def stopped(program: Program) -> None:
    """Wait until a process has stopped itself at its fault point."""
    wait_until(lambda: _state(program.process.pid) == "T", "the stop")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


async def _connected(name: str) -> RemoteArena:
    entry = Registry().lookup(name)
    assert isinstance(entry, ArenaEntry)
    return await RemoteArena.connect(entry.control_socket)


def status(name: str) -> Status:
    """Where an arena is in its life."""

    async def ask() -> Status:
        arena = await _connected(name)
        try:
            return await arena.status()
        finally:
            arena.close()

    return asyncio.run(ask())


def writes(name: str) -> int:
    """Pages that a ledger has written so far, read from its memory: its threads are not asked."""

    async def read() -> int:
        arena = await _connected(name)
        (region,) = arena.regions
        mapping = _engine.Mapping(region.fd, region.length)
        try:
            return sum(_engine.Ledger.attach(mapping, threads=0).writes())
        finally:
            arena.close()

    return asyncio.run(read())


def runs(name: str) -> None:
    """It writes."""
    before = writes(name)
    wait_until(lambda: writes(name) > before, f"a write of {name}")


def stands_still(name: str) -> bool:
    """It does not write, as far as one can tell in a while."""
    before = writes(name)
    return all(writes(name) == before for _ in range(30))


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


def ends_intact(program: Program, reason: str = "stopped") -> dict[str, Any]:
    """End a ledger's process; it must have every write that it ever made."""
    if reason == "stopped":
        program.process.terminate()
    end: dict[str, Any] = program.json()
    assert (end["type"], end["reason"], end["intact"]) == ("ledger", reason, True), end
    assert program.wait() == 0
    return end
