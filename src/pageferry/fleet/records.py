"""Durable record of a workload of a fleet, in the directory of the workload (`pageferry.host.registry`).

The record has what the registry does not know: the command line of a guest with its placeholders, labels, and the
anti-affinity group. A workload without a record can be moved too: its command line is that of its process.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pageferry.errors import UnsupportedError, WorkloadDied
from pageferry.fleet.protocol import Moved
from pageferry.host import proc
from pageferry.host.registry import AnyEntry, ArenaEntry, Folder, QemuEntry, Registry
from pageferry.workloads.qemu import command_line

RECORD = "fleet.json"
_LEDGER = ("pageferry.demo.process", "--workload")
"""Words in the command line of a process that runs the built-in workload."""


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a workload of a fleet."""

    command: tuple[str, ...] = ()
    """Command line of QEMU with its placeholders; empty for other kinds."""
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    group: str | None = None


def membership(registry: Registry, name: str) -> Membership:
    """Return the record of a workload; an empty one if there is none. Raises WorkloadError."""
    return Folder(registry, name).load(RECORD, Membership) or Membership()


def remember(registry: Registry, moved: Moved) -> None:
    """Store the record of a workload, if the workload exists and has no record."""
    folder = Folder(registry, moved.name)
    if folder.path.is_dir() and not (folder.path / RECORD).exists():
        folder.store(RECORD, Membership(command=moved.command, labels=moved.labels, group=moved.group))


def prepare(registry: Registry, name: str, entry: AnyEntry) -> Moved:
    """Return what another host needs to receive a workload.

    Raises UnsupportedError if no other host can receive it, WorkloadDied, WorkloadError.
    """
    record = membership(registry, name)
    kind, command = "qemu", list(record.command)
    match entry:
        case QemuEntry(domain=str(domain)):
            raise UnsupportedError(
                f"cannot move {name}: libvirt manages it as the domain {domain}; use `pageferry migrate`"
            )
        case QemuEntry(adopted=True):
            raise UnsupportedError(
                f"cannot move {name}: another program has started it, and its command line is not known; use "
                "`pageferry migrate`"
            )
        case QemuEntry():
            command = command or command_line.given_by_user(proc.arguments(entry.pid)) or []
            if not command:
                raise UnsupportedError(
                    f"cannot move {name}: the command line of its process is not that of `pageferry run`; use "
                    "`pageferry migrate`"
                )
        case ArenaEntry():
            kind = "demo"
            if not set(_LEDGER) & set(_words(entry.pid)):
                raise UnsupportedError(
                    f"cannot move {name}: the program that has this arena must receive it; use `pageferry migrate` "
                    "and pageferry.receive, or pageferry.fleet.Movable"
                )
        case _:
            raise UnsupportedError(f"cannot move {name}: it is still being started; retry when it runs")
    return Moved(name=name, kind=kind, command=tuple(command), labels=record.labels, group=record.group)  # type: ignore[arg-type]


def _words(pid: int) -> list[str]:
    try:
        return proc.arguments(pid)
    except WorkloadDied:
        return []
