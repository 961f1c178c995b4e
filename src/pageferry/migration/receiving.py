"""Python API of a receiver: `receive`. The command `pageferry receive` opens its listener with `ListenOptions`,
too."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from pageferry import values
from pageferry.errors import UsageError
from pageferry.host.blocking import beside_loop, synchronous
from pageferry.host.proc import meminfo
from pageferry.host.registry import Registry
from pageferry.migration.destination import Destination
from pageferry.migration.incoming import ReceivingHost
from pageferry.migration.options import TIMEOUT
from pageferry.migration.ownership import CommitDecisions
from pageferry.migration.transport import messages
from pageferry.migration.transport.addresses import resolve
from pageferry.migration.transport.connection import ConnectionListener
from pageferry.migration.transport.tls import Trust
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.arena.limits import MAX_ARENA
from pageferry.workloads.arena.options import ArenaArguments, ArenaOptions
from pageferry.workloads.callbacks import check_listener
from pageferry.workloads.protocols import Migratable

_reports: set[asyncio.Task[None]] = set()
"""Tasks that send a report. This set keeps them alive: the event loop has only weak references to its tasks."""


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Options of a listener for sources. Raises UsageError."""

    timeout: float = 30.0
    """Seconds of silence after which a peer counts as lost."""
    insecure: bool = False
    """Allow unencrypted connections to addresses other than loopback."""
    tls: str | os.PathLike[str] | None = None
    """Directory of certificates (docs/tls.md): accept only sources with a certificate."""
    allow: Sequence[str] = ()
    """With `tls`: names of the certificates to accept; if empty, all certificates of the authority."""

    def __post_init__(self) -> None:
        checked = {
            "timeout": TIMEOUT.check("timeout", self.timeout),
            "insecure": values.flag("insecure", self.insecure),
            "tls": values.optional(values.path, "tls", self.tls),
            "allow": values.texts("allow", self.allow),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.allow and self.tls is None:
            raise UsageError(
                "`allow` requires `tls`: sources are identified by their certificates; remove `allow`, or add `tls`"
            )

    def open(self, address: str) -> ConnectionListener:
        """Open the listener. Raises UsageError."""
        trust = None if self.tls is None else Trust(Path(self.tls), "receiver", allow=tuple(self.allow))
        target = resolve(address, insecure=self.insecure, what="address to listen on", trust=trust)
        return ConnectionListener(target, self.timeout, trust)


class ReceiveArguments(ArenaArguments, total=False):
    """Keyword arguments of `receive` for the fields of `ReceiveOptions`."""

    name: str | None
    max_size: int | str | None
    listening: Callable[[str], object] | None
    timeout: float | str
    insecure: bool
    tls: str | os.PathLike[str] | None
    allow: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class ReceiveOptions(ArenaOptions, ListenOptions):
    """Options of `receive`; those of `Arena` have the same meaning. Raises UsageError."""

    max_size: int | None = None
    """Maximum size of the arena, bytes; None for the available memory."""
    listening: Callable[[str], object] | None = None
    """Function that is called with the address once sources can connect, or None."""

    def __post_init__(self) -> None:
        ArenaOptions.__post_init__(self)
        most = values.optional(values.size, "max_size", self.max_size, 1, MAX_ARENA)
        object.__setattr__(self, "max_size", most)
        values.optional(values.function, "listening", self.listening)
        ListenOptions.__post_init__(self)
        if self.listening is not None:
            check_listener("listening", self.listening)

    def arena(self, fresh: Arena) -> Arena:
        """Return an arena with these options over the memory of `fresh`."""
        return Arena.from_file(fresh.descriptor, fresh.length, self.name, private=True, **self.arguments())


async def receive_async(address: str, **options: Unpack[ReceiveArguments]) -> Arena:
    """Listen at `address` for an arena, and return it when it runs in this process.

    `address`: unix:PATH, for sources on this host, or HOST:PORT (port 0: any free port). Without certificates, a source
    on this host is accepted only if its process belongs to root or to our user.

    `options` are the fields of `pageferry.migration.receiving.ReceiveOptions`. Those of `Arena` are name, state,
    on_pause, on_resume, on_moved, direct_io, capacity and loop (default: the running event loop). `on_resume` is
    called when this process becomes the owner of the arena. `listening` is called with the address once sources can
    connect. An arena larger than max_size bytes (default: the available memory) is rejected. timeout: seconds of
    silence that end the migration. tls: a directory of certificates (docs/tls.md); then only sources with a certificate
    are accepted. allow: names of the certificates to accept (default: all certificates of the authority). insecure:
    listen on addresses other than loopback without tls.

    A post-copy or hybrid migration is rejected: a thread of this program that waits for a page may hold a lock that the
    other threads need. Raises MigrationError, UsageError.

    Examples:
        >>> from queue import Queue
        >>> from threading import Thread
        >>> import pageferry
        >>> addresses, received = Queue(), Queue()
        >>> def receive():  # usually another program, on this host or another one
        ...     received.put(pageferry.receive("127.0.0.1:0", listening=addresses.put))
        >>> Thread(target=receive).start()
        >>> arena = pageferry.Arena("1MiB")
        >>> memoryview(arena)[5000] = 7
        >>> result = pageferry.migrate(arena, addresses.get())
        >>> print(result.status, arena.status, memoryview(received.get())[5000])
        completed moved 7
    """
    chosen = values.options(ReceiveOptions, options)

    async def work(heard: Callable[[str], object]) -> Arena:
        connections = chosen.open(address)
        heard(str(connections.address))
        return await _receive(connections, chosen)

    return await beside_loop(work, chosen.listening or (lambda _: None))


receive = synchronous(receive_async)


async def _receive(connections: ConnectionListener, options: ReceiveOptions) -> Arena:
    received: list[Arena] = []

    async def prepare(hello: messages.Hello) -> Migratable:
        if hello.mode != "precopy":
            raise UsageError(
                "cannot receive an arena in post-copy: all of its memory must be sent first; use `mode` precopy"
            )
        fresh = arena_for(hello, options.max_size, options.capacity)
        arena = options.arena(fresh)
        received.append(arena)
        return arena.workload()

    destination = Destination(
        connections, prepare, ReceivingHost(decisions=CommitDecisions(Registry().path), timeout=options.timeout)
    )
    try:
        await destination.run()
    finally:
        destination.close()
        await connections.close()
    # The caller owns the arena now. The source waits briefly for the report, and completes without it.
    report = asyncio.create_task(destination.report())
    _reports.add(report)
    report.add_done_callback(_reports.discard)
    return received[-1]


def arena_for(hello: messages.Hello, max_size: int | None = None, capacity: int | str | None = None) -> Arena:
    """Create an empty arena for a Hello. The arena can grow to `capacity` bytes. Raises UsageError if the workload is
    not an arena, is too large, or is larger than `capacity`."""
    if hello.kind != "arena" or [region.name for region in hello.regions] != ["arena"]:
        raise UsageError(f"cannot receive {hello.name}: its kind is {hello.kind}, and this receiver expects an arena")
    size, most = hello.regions[0].length, max_size or meminfo()["MemAvailable"]
    if size > most:
        raise UsageError(
            f"cannot receive {hello.name}: it has {size >> 20} MiB, and this receiver accepts at most "
            f"{most >> 20} MiB; raise `max_size`, or free memory"
        )
    return Arena(size, capacity=capacity)
