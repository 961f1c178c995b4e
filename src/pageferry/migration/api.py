"""Python API of the source of a migration: `migrate`, `recover` and `take_back`, which the commands use too."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar, Unpack

from pageferry import values
from pageferry.errors import (
    AuthenticationError,
    ConnectionLost,
    MigrationError,
    OutcomeUnknown,
    PeerRefused,
    ProtocolError,
    UnsupportedError,
    UsageError,
    WorkloadDied,
    WorkloadError,
)
from pageferry.events import Listener, ignore
from pageferry.host.blocking import beside_loop, in_thread, synchronous
from pageferry.migration import disk_source
from pageferry.migration.events import MigrationResult
from pageferry.migration.options import MigrationArguments, Options, RecoverArguments, RecoverOptions
from pageferry.migration.ownership import RECORD, Committed, committed
from pageferry.migration.postcopy_source import serve_on
from pageferry.migration.session import Job
from pageferry.migration.source import Source
from pageferry.migration.transport import messages, peer_users
from pageferry.migration.transport.addresses import Address, resolve
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.connection import connect_control
from pageferry.migration.transport.messages import Owner
from pageferry.migration.transport.tls import Trust
from pageferry.workloads import persistent_trace
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.callbacks import check_listener
from pageferry.workloads.deferred_access import AcquiredPager, acquire_uffd, wait_complete
from pageferry.workloads.folders import folder_of
from pageferry.workloads.lifecycle import LocalWorkload
from pageferry.workloads.managed import HasArena, managed
from pageferry.workloads.protocols import Migratable, announce, clone_of, placed_regions

T = TypeVar("T")


async def migrate_async(
    workload: Arena | HasArena | Migratable,
    address: str,
    *,
    listener: Listener = ignore,
    **options: Unpack[MigrationArguments],
) -> MigrationResult:
    """Migrate a running workload to the receiver at `address` (unix:PATH, HOST:PORT). When the call returns, the
    workload runs there.

    `options` are the fields of `pageferry.migration.options.Options`: mode, max_downtime (seconds), max_rounds,
    auto_converge, trace_granularity, large_pages, memory, populate, codec, adaptive, bandwidth (bytes per second),
    streams, disks, copy_disks, timeout (seconds), insecure, tls, tls_hostname. `listener` is called with an event after
    every round.

    Raises UsageError for invalid options, and MigrationError if the migration failed. The workload then keeps running
    at the source, with two exceptions. After OutcomeUnknown, it is paused until `recover` has learned the outcome.
    After PostcopyPaused, it runs at the destination and waits for pages that `recover` sends.

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
    workload = managed(workload)
    values.function("listener", listener)
    check_listener("listener", listener)
    chosen = values.options(Options, options)
    if isinstance(workload, Arena):
        workload.check_here()
        if len(asyncio.all_tasks()) > 1:
            workload.check_lock()
        return await _of_arena(workload, lambda moved, heard: _migrate(moved, address, chosen, heard), listener)
    return await _migrate(workload, address, chosen, listener)


migrate = synchronous(migrate_async)


async def _migrate(workload: Migratable, address: str, options: Options, listener: Listener) -> MigrationResult:
    workload.check_migratable()
    _check_clone(workload, options)
    disk_source.check(workload, options)
    trust = options.trust()
    target = resolve(address, insecure=options.insecure, what="destination", trust=trust)
    folder = folder_of(workload)
    if committed(folder) is not None and not await workload.running():
        raise WorkloadError(
            f"cannot migrate {workload.name}: it was committed by an earlier migration whose outcome is unknown; run "
            f"pageferry migrate {workload.name} --recover"
        )
    hold = await _page_tables(workload, options)
    job = Job(workload=workload, options=options, listener=listener, folder=folder, trust=trust, hold=hold)
    try:
        return await Source(job).run(target)
    except WorkloadDied as died:
        raise WorkloadDied(f"{workload.name} exited during its migration to {target}: {died}; restart it") from died
    except (AuthenticationError, ConnectionLost, PeerRefused, ProtocolError) as error:
        raise type(error)(
            f"{error}. {workload.name} {await _state_of(workload)} on this host and can be migrated again"
        ) from error
    finally:
        if hold is not None:
            await asyncio.shield(in_thread(hold.release))


def _check_clone(workload: Migratable, options: Options) -> None:
    """Raise UnsupportedError if a clone would be migrated in a mode that clones do not support, UsageError if an option
    for clones is given for another workload."""
    clone = clone_of(workload)
    if clone is None and options.memory == "shared":
        raise UsageError(
            f"`memory` shared is not possible for {workload.name}: it does not share the memory of an image; omit it"
        )
    if clone is not None and options.mode != "precopy":
        raise UnsupportedError(
            f"cannot migrate {workload.name} in {options.mode} mode: it shares the memory of {clone.image}; use `mode` "
            "precopy"
        )


async def _of_arena(
    arena: Arena, work: Callable[[LocalWorkload, Listener], Coroutine[Any, Any, T]], listener: Listener = ignore
) -> T:
    """Run an operation on an arena outside the caller's event loop, as a separate controller (see `lifecycle`)."""

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
    """Ensure that write traces can be installed. Return the acquired pager of a workload with deferred memory,
    otherwise None."""
    if clone_of(workload) is not None:
        return None  # its base is loaded by another pager, and checkpoints leave no trace
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


async def recover_async(
    workload: Arena | HasArena | Migratable,
    doubt: OutcomeUnknown | None = None,
    *,
    listener: Listener = ignore,
    **options: Unpack[RecoverArguments],
) -> Owner:
    """Resolve a migration whose outcome is unknown, or reconnect one that lost its link in post-copy.

    `doubt`: the error that `migrate` raised; not needed for a workload that is registered by name, which has a record.
    Returns `destination` (the workload runs there, and its remains at the source have been discarded) or `source` (the
    workload runs at the source). Pages that the destination lacks are sent first.

    `options` are the fields of `pageferry.migration.options.RecoverOptions`: timeout (seconds), insecure, tls,
    tls_hostname (default: the name that the migration was sent to).

    Raises UsageError if there is no such migration, OutcomeUnknown if the peer cannot be reached or has no record of
    the migration, PostcopyPaused if pages cannot be sent.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> try:
        ...     result = pageferry.migrate(arena, "127.0.0.1:1")  # no process listens there
        ... except pageferry.errors.OutcomeUnknown as doubt:
        ...     print(pageferry.recover(arena, doubt))
        ... except pageferry.errors.MigrationError:
        ...     print(arena.status)  # the migration failed, and nothing has changed
        running
    """
    workload = managed(workload)
    values.function("listener", listener)
    check_listener("listener", listener)
    values.optional(values.instance, "doubt", doubt, OutcomeUnknown)
    chosen = values.options(RecoverOptions, options)
    if isinstance(workload, Arena):
        return await _of_arena(workload, lambda moved, heard: _recover(moved, doubt, chosen, heard), listener)
    return await _recover(workload, doubt, chosen, listener)


recover = synchronous(recover_async)


async def _recover(
    workload: Migratable, doubt: OutcomeUnknown | None, options: RecoverOptions, listener: Listener
) -> Owner:
    record = _in_doubt(workload, doubt)
    trust = options.trust(record.hostname)
    address = resolve(record.peer, insecure=options.insecure, what="peer", trust=trust)
    owners = peer_users.owners_of(segment.pid for region in placed_regions(workload) for segment in region.segments)
    async with _asked(address, record, workload.name, options.timeout, trust, owners) as (outcome, channel):
        if outcome.owner == "destination":
            if record.keeps_pages and not outcome.complete:
                await serve_on(workload, record, channel, address, options.timeout, listener)
            await workload.discard()
            with contextlib.suppress(MigrationError):
                await channel.send(messages.Done())
    if outcome.owner == "unknown":
        raise OutcomeUnknown(
            f"{record.peer} has no record of this migration of {workload.name}: check that it is the host to "
            "which the workload was sent, with the same run directory; if that host is lost permanently, run "
            f"pageferry migrate {workload.name} --take-back",
            record.migration,
            record.peer,
            record.hostname,
        )
    if outcome.owner == "source":
        await take_back_async(workload, doubt)
    return outcome.owner


async def take_back_async(workload: Arena | HasArena | Migratable, doubt: OutcomeUnknown | None = None) -> None:
    """Restore the workload at the source to its state before the migration: running, or paused if its user had paused
    it.

    Call this function only if the destination does not run the workload and never will. `doubt`: as for `recover`.
    Raises UsageError if the workload was not handed over.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> pageferry.take_back(arena)  # it was not migrated
        Traceback (most recent call last):
        pageferry.errors.UsageError: cannot recover ...: no migration of it is pending recovery
    """
    workload = managed(workload)
    values.optional(values.instance, "doubt", doubt, OutcomeUnknown)
    if isinstance(workload, Arena):
        await _of_arena(workload, lambda moved, _: take_back_async(moved, doubt))
        return
    record = _in_doubt(workload, doubt)
    await workload.revert(record.changes)
    await announce(workload)
    if (folder := folder_of(workload)) is not None:
        folder.forget(RECORD)


take_back = synchronous(take_back_async)


def _in_doubt(workload: Migratable, doubt: OutcomeUnknown | None) -> Committed:
    record = committed(folder_of(workload))
    if doubt is not None and doubt.migration and (record is None or record.migration != doubt.migration):
        return Committed(migration=doubt.migration, peer=doubt.peer, hostname=doubt.hostname)
    if record is None:
        raise UsageError(f"cannot recover {workload.name}: no migration of it is pending recovery")
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
    """Request the outcome of a migration from the peer; yield the outcome and the connection. Raises OutcomeUnknown."""
    again = f"{name} stays paused; start `pageferry receive` on that host and retry"
    if record.keeps_pages:
        again = (
            f"{name} stays paused, with all its pages; if no process receives it there, start "
            f"`pageferry receive --resume` on that host and retry"
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
