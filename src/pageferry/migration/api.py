"""Python API of migrations: `migrate`, `receive`, `recover` and `take_back`, which the commands use too."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from pageferry import values
from pageferry.errors import (
    AuthenticationError,
    ConnectionLost,
    MigrationError,
    OutcomeUnknown,
    PeerRefused,
    ProtocolError,
    UsageError,
    WorkloadDied,
    WorkloadError,
)
from pageferry.events import Listener, ignore
from pageferry.host.blocking import beside_loop, in_thread, synchronous
from pageferry.host.proc import meminfo
from pageferry.host.registry import Registry
from pageferry.migration.destination import Destination
from pageferry.migration.events import MigrationResult
from pageferry.migration.incoming import ReceivingHost
from pageferry.migration.options import Options
from pageferry.migration.options import timeout as options_timeout
from pageferry.migration.ownership import RECORD, Committed, Verdicts, committed
from pageferry.migration.postcopy_source import serve_on
from pageferry.migration.session import Job
from pageferry.migration.source import Source
from pageferry.migration.transport import messages, peer_users
from pageferry.migration.transport.addresses import Address, resolve
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.connection import Reception, connect_control
from pageferry.migration.transport.messages import Owner
from pageferry.migration.transport.tls import Trust
from pageferry.workloads import persistent_trace
from pageferry.workloads.arena.arena import Arena, State
from pageferry.workloads.arena.arguments import check_arena
from pageferry.workloads.arena.limits import MAX_ARENA
from pageferry.workloads.callbacks import Callback, Plain, check_listener
from pageferry.workloads.deferred_access import AcquiredPager, acquire_uffd, wait_complete
from pageferry.workloads.folders import folder_of
from pageferry.workloads.lifecycle import LocalWorkload
from pageferry.workloads.managed import managed
from pageferry.workloads.protocols import Migratable

T = TypeVar("T")

_reports: set[asyncio.Task[None]] = set()
"""Reports being sent. The event loop keeps only weak references to its tasks."""


async def migrate_async(
    workload: Arena | Migratable, address: str, *, listener: Listener = ignore, **options: Any
) -> MigrationResult:
    """Migrate a running workload to the receiver at `address` (unix:PATH, HOST:PORT); on return it runs there.

    `options` are the fields of `pageferry.migration.options.Options`: mode, max_downtime (seconds), max_rounds,
    auto_converge, trace_granularity, large_pages, populate, codec, adaptive, bandwidth (bytes per second), streams,
    timeout (seconds), insecure, tls, tls_hostname. `listener` is called with an event after every round.

    Raises UsageError for invalid options, and MigrationError if the migration failed. The workload then keeps running
    at the source, with two exceptions: after OutcomeUnknown it is paused until `recover` has asked the receiver; after
    PostcopyPaused it runs at the destination and waits for pages that `recover` sends.
    """
    managed(workload)
    values.function("listener", listener)
    check_listener("listener", listener)
    chosen = values.options(Options, options)
    if isinstance(workload, Arena):
        workload.check_here()
        if len(asyncio.all_tasks()) > 1:
            workload.check_lock()
        return await _of_arena(
            workload, lambda moved, heard: migrate_async(moved, address, listener=heard, **options), listener
        )
    moved = workload
    trust = chosen.trust()
    target = resolve(address, insecure=chosen.insecure, what="destination", trust=trust)
    folder = folder_of(moved)
    if committed(folder) is not None and not await moved.running():
        raise WorkloadError(
            f"cannot migrate {moved.name}: it was committed by an earlier migration whose outcome is unknown; run "
            f"pageferry migrate {moved.name} --recover"
        )
    hold = await _page_tables(moved, chosen)
    try:
        job = Job(workload=moved, options=chosen, listener=listener, folder=folder, trust=trust, hold=hold)
        return await Source(job).run(target)
    except WorkloadDied as died:
        raise WorkloadDied(f"{moved.name} ended during its migration to {target}: {died}; restart it") from died
    except (AuthenticationError, ConnectionLost, PeerRefused, ProtocolError) as error:
        raise type(error)(
            f"{error}. {moved.name} {await _state_of(moved)} on this host and can be migrated again"
        ) from error
    finally:
        if hold is not None:
            await asyncio.shield(in_thread(hold.release))


migrate = synchronous(migrate_async)


async def _of_arena(
    arena: Arena, work: Callable[[LocalWorkload, Listener], Coroutine[Any, Any, T]], listener: Listener = ignore
) -> T:
    """Run an operation on an arena outside its caller's event loop, as a separate controller (see `lifecycle`)."""

    async def run(heard: Listener) -> T:
        workload = arena.workload()
        try:
            return await work(workload, heard)
        finally:
            workload.close()

    return await beside_loop(run, listener)


async def _state_of(workload: Migratable) -> str:
    """Describe the state of a workload after a failed migration."""
    with contextlib.suppress(WorkloadError):
        if not await workload.running():
            return "is still paused"
    return "is still running"


async def _page_tables(workload: Migratable, options: Options) -> AcquiredPager | None:
    """Ensure that write traces can be installed. Return the pager, acquired, of a workload with deferred memory."""
    if options.mode == "postcopy":
        # The destination may request any page once the workload runs there, so all pages must be loaded first.
        await wait_complete(workload)
        return None
    hold = await acquire_uffd(workload)
    try:
        await in_thread(persistent_trace.forget, workload)
    except BaseException:
        if hold is not None:
            await asyncio.shield(in_thread(hold.release))
        raise
    return hold


async def receive_async(
    address: str,
    *,
    name: str | None = None,
    state: State | None = None,
    on_pause: Callback | None = None,
    on_resume: Plain | None = None,
    on_moved: Plain | None = None,
    direct_io: bool = True,
    loop: asyncio.AbstractEventLoop | None = None,
    max_size: int | None = None,
    listening: Callable[[str], object] | None = None,
    timeout: float = 30.0,
    insecure: bool = False,
    tls: str | os.PathLike[str] | None = None,
    allow: Sequence[str] = (),
) -> Arena:
    """Listen at `address` for an arena, and return it when it runs in this process.

    `address`: unix:PATH, for sources on this host, or HOST:PORT (port 0: any free port). Without certificates, a source
    on this host is accepted only if its process belongs to root or to our user.

    Name, state and callbacks are those of `Arena`. `on_resume` is called when this process becomes the owner of the
    arena; `loop` is by default the running event loop. `listening` is called with the address once sources can connect.
    An arena larger than `max_size` bytes (default: the available memory) is rejected. So is a post-copy or hybrid
    migration: a thread of this program that waits for a page may hold a lock that the other threads need. `tls`: a
    directory of certificates (docs/tls.md); then only sources with a certificate are accepted, and if `allow` is not
    empty, only those with a name in it. Raises MigrationError, UsageError.
    """
    check_arena(name, state, on_pause, on_resume, on_moved)
    most = values.optional(values.size, "max_size", max_size, 1, MAX_ARENA)
    values.optional(values.function, "listening", listening)
    timeout = options_timeout(timeout)
    notify: Callable[[str], object] = listening or (lambda _: None)
    check_listener("listening", notify)

    def make(file: int, size: int) -> Arena:
        return Arena.from_file(
            file,
            size,
            name,
            state=state,
            on_pause=on_pause,
            on_resume=on_resume,
            on_moved=on_moved,
            direct_io=direct_io,
            loop=loop,
            private=True,
        )

    async def work(heard: Callable[[str], object]) -> Arena:
        reception = open_reception(address, timeout, insecure=insecure, tls=tls, allow=allow)
        heard(str(reception.address))
        return await _receive(reception, make, most, timeout)

    return await beside_loop(work, notify)


receive = synchronous(receive_async)


async def _receive(
    reception: Reception, make: Callable[[int, int], Arena], max_size: int | None, timeout: float
) -> Arena:
    received: list[Arena] = []

    async def prepare(hello: messages.Hello) -> Migratable:
        if hello.mode != "precopy":
            raise UsageError(
                "cannot receive an arena in post-copy: all of its memory must be sent first; use `mode` precopy"
            )
        fresh = arena_for(hello, max_size)
        arena = make(fresh.descriptor, fresh.length)
        received.append(arena)
        return arena.workload()

    destination = Destination(reception, prepare, ReceivingHost(verdicts=Verdicts(Registry().path), timeout=timeout))
    try:
        await destination.run()
    finally:
        destination.close()
        await reception.close()
    # The caller owns the arena now. The source waits briefly for the report, and completes without it.
    report = asyncio.create_task(destination.report())
    _reports.add(report)
    report.add_done_callback(_reports.discard)
    return received[-1]


def open_reception(
    address: str,
    timeout: float,
    *,
    insecure: bool,
    tls: str | os.PathLike[str] | None,
    allow: Sequence[str],
) -> Reception:
    """Open a listener with the options of `receive`. Raises UsageError."""
    values.flag("insecure", insecure)
    folder, names = values.optional(values.path, "tls", tls), values.texts("allow", allow)
    if names and folder is None:
        raise UsageError("`allow` requires `tls`: sources are identified by their certificates")
    trust = None if folder is None else Trust(folder, "receiver", allow=names)
    return Reception(resolve(address, insecure=insecure, what="address to listen on", trust=trust), timeout, trust)


def arena_for(hello: messages.Hello, max_size: int | None = None) -> Arena:
    """Create an empty arena for a Hello. Raises UsageError if the workload is not an arena or is too large."""
    if hello.kind != "arena" or [region.name for region in hello.regions] != ["arena"]:
        raise UsageError(f"cannot receive {hello.name}: its kind is {hello.kind}, and this receiver expects an arena")
    size, most = hello.regions[0].length, max_size or meminfo()["MemAvailable"]
    if size > most:
        raise UsageError(
            f"cannot receive {hello.name}: it has {size >> 20} MiB, and this receiver accepts at most {most >> 20} MiB"
        )
    return Arena(size)


async def recover_async(
    workload: Arena | Migratable,
    doubt: OutcomeUnknown | None = None,
    *,
    timeout: float = 30.0,
    insecure: bool = False,
    tls: str | os.PathLike[str] | None = None,
    tls_hostname: str | None = None,
    listener: Listener = ignore,
) -> Owner:
    """Resolve a migration whose outcome is unknown, or reconnect one that lost its link in post-copy.

    `doubt`: the error that `migrate` raised; not needed for a workload that is registered by name, which has a record.
    Returns `destination` (the workload runs there, and its remains at the source have been discarded) or `source` (it
    runs at the source). Raises UsageError if there is no such migration, OutcomeUnknown if the peer cannot be reached
    or has no record of it. Pages that the destination lacks are sent first; raises PostcopyPaused if that fails.
    `insecure`, `tls` and `tls_hostname` (default: the name that the migration was sent to) are those of `Options`.
    """
    managed(workload)
    values.function("listener", listener)
    check_listener("listener", listener)
    values.optional(values.instance, "doubt", doubt, OutcomeUnknown)
    timeout = options_timeout(timeout)
    Options(insecure=insecure, tls=tls, tls_hostname=tls_hostname)
    if isinstance(workload, Arena):
        link: dict[str, Any] = {"timeout": timeout, "insecure": insecure, "tls": tls, "tls_hostname": tls_hostname}
        return await _of_arena(
            workload, lambda moved, heard: recover_async(moved, doubt, listener=heard, **link), listener
        )
    moved = workload
    record = _in_doubt(moved, doubt)
    chosen = Options(insecure=insecure, tls=tls, tls_hostname=tls_hostname or (record.hostname if tls else None))
    trust = chosen.trust()
    address = resolve(record.peer, insecure=insecure, what="peer", trust=trust)
    owners = peer_users.owners_of(segment.pid for region in moved.regions for segment in region.segments)
    async with _asked(address, record, moved.name, timeout, trust, owners) as (outcome, channel):
        if outcome.owner == "destination":
            if record.keeps_pages and not outcome.complete:
                await serve_on(moved, record, channel, address, timeout, listener)
            await moved.discard()
            with contextlib.suppress(MigrationError):
                await channel.send(messages.Done())
    match outcome.owner:
        case "destination":
            pass
        case "source":
            await take_back_async(moved, doubt)
        case _:
            raise OutcomeUnknown(
                f"{record.peer} has no record of this migration of {moved.name}: check that it is the host to "
                "which the workload was sent, with the same run directory; if that host is lost permanently, run "
                f"pageferry migrate {moved.name} --take-back",
                record.migration,
                record.peer,
                record.hostname,
            )
    return outcome.owner


recover = synchronous(recover_async)


async def take_back_async(workload: Arena | Migratable, doubt: OutcomeUnknown | None = None) -> None:
    """Restore the workload at the source to its state before the migration: running, or paused if its user had paused
    it.

    Only for a caller that knows that the destination does not run the workload and never will. `doubt` as for
    `recover`. Raises UsageError if the workload was not handed over.
    """
    managed(workload)
    values.optional(values.instance, "doubt", doubt, OutcomeUnknown)
    if isinstance(workload, Arena):
        await _of_arena(workload, lambda moved, _: take_back_async(moved, doubt))
        return
    record = _in_doubt(workload, doubt)
    await workload.revert(record.changes)
    if (folder := folder_of(workload)) is not None:
        folder.forget(RECORD)


take_back = synchronous(take_back_async)


def _in_doubt(workload: Migratable, doubt: OutcomeUnknown | None) -> Committed:
    record = committed(folder_of(workload))
    if doubt is not None and doubt.migration and (record is None or record.migration != doubt.migration):
        return Committed(migration=doubt.migration, peer=doubt.peer, hostname=doubt.hostname)
    if record is None:
        raise UsageError(f"no migration of {workload.name} is pending recovery")
    return record


@contextlib.asynccontextmanager
async def _asked(
    address: Address,
    record: Committed,
    name: str,
    timeout: float,
    trust: Trust | None,
    owners: frozenset[int],
) -> AsyncIterator[tuple[messages.Outcome, Channel]]:
    """Ask the peer for the outcome of a migration; yield it and the connection."""
    again = f"{name} stays paused; start `pageferry receive` on that host and ask again"
    if record.keeps_pages:
        again = (
            f"{name} stays paused, with all its pages; if it is no more received there, start "
            f"`pageferry receive --resume` on that host and ask again"
        )
    channel: Channel | None = None
    try:
        try:
            channel = await connect_control(address, timeout, trust, owners)
            await channel.send(messages.Recover(version=messages.VERSION, migration=record.migration))
            outcome = await channel.receive(messages.Outcome)
        except MigrationError as error:
            raise OutcomeUnknown(
                f"cannot determine the outcome of the migration of {name} from {address}: {error}. {again}",
                record.migration,
                record.peer,
                record.hostname,
            ) from error
        yield outcome, channel
    finally:
        if channel is not None:
            await channel.close()
