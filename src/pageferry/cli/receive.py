"""`pageferry receive`: wait for a migrating workload and run it on this host."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from logging import getLogger
from pathlib import Path

from pageferry import report
from pageferry.cli.foreground import run_in_foreground
from pageferry.cli.options import given, refuse
from pageferry.cli.syntax.receive import ReceiveOptions
from pageferry.demo.events import LedgerResult
from pageferry.demo.ledger import LedgerWorkload
from pageferry.errors import ConnectionLost, PeerRefused, ProtocolError, UsageError
from pageferry.host.blocking import in_thread
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.migration.destination import Destination, Prepare
from pageferry.migration.events import Listening, Received, Resumed
from pageferry.migration.incoming import ReceivingHost
from pageferry.migration.ownership import CommitDecisions
from pageferry.migration.postcopy_destination import Resumption
from pageferry.migration.receiving import ListenOptions, arena_for
from pageferry.migration.transport import messages
from pageferry.migration.transport.connection import ConnectionListener
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.workloads.protocols import Migratable
from pageferry.workloads.qemu.guest import QemuWorkload

log = getLogger(__name__)


async def run(args: argparse.Namespace) -> int:
    """Receive a workload, and unless `--detach` is given, wait until it exits. With `--resume`, receive the remaining
    memory of a guest that this host owns."""
    command = args.command
    ReceiveOptions(**given(args, ReceiveOptions))  # raises UsageError before any other work
    if (args.workload is not None) + bool(command) + args.resume != 1:
        raise UsageError(
            "invalid arguments: expected exactly one of --workload demo, --resume, or a QEMU command line after --"
        )
    _refuse_ignored(args)
    with open_reporter(args.output, lambda: report.ReceiveView()) as out:
        chosen = ListenOptions(timeout=args.timeout, insecure=args.insecure, tls=args.tls, allow=args.allow)
        connections = chosen.open(_address(args))
        try:
            if args.resume:
                return await _resume(args, connections, out)
            if command:
                return await _receive_guest(args, command, connections, out)
            return await _receive_ledger(args, connections, out)
        finally:
            await connections.close()


def _refuse_ignored(args: argparse.Namespace) -> None:
    """Raise UsageError if an option does not apply to the kind of workload."""
    if args.resume:
        refuse(args, ("detach", "hugetlb", "max_size", "memory", "base"), "with --resume")
    elif args.command:
        refuse(args, ("max_size",), "with a QEMU command line, whose -m determines the size")
    else:
        refuse(args, ("detach", "hugetlb", "memory", "base"), "with --workload demo")


def _address(args: argparse.Namespace) -> str:
    """Return the address to listen on. By default, this is a Unix socket to which only this user and root can connect.
    With TLS or `--insecure`, it is a free port on the loopback interface."""
    if args.listen is not None:
        return str(args.listen)
    return "127.0.0.1:0" if args.tls or args.insecure else f"unix:{Registry().receiver_socket(args.name)}"


def _destination(
    args: argparse.Namespace,
    connections: ConnectionListener,
    prepare: Prepare,
    out: Reporter,
    guest: QemuWorkload | None = None,
) -> Destination:
    return Destination(connections, prepare, _host(args, out), guest.died if guest is not None else None)


def _host(args: argparse.Namespace, out: Reporter) -> ReceivingHost:
    registry = Registry()
    return ReceivingHost(
        decisions=CommitDecisions(registry.path),
        timeout=args.timeout,
        folder=lambda: registry.folder(args.name),
        listener=out.event,
        registry=registry,
        memory=args.memory,
        bases=[Path(one) for one in args.base],
    )


async def _resume(args: argparse.Namespace, connections: ConnectionListener, out: Reporter) -> int:
    resumption = Resumption(Registry().folder(args.name), connections, _host(args, out))
    out.event(Listening(args.name, str(connections.address)))
    await resumption.run()
    out.final(Resumed(args.name))
    return 0


async def _receive_guest(
    args: argparse.Namespace, command: list[str], connections: ConnectionListener, out: Reporter
) -> int:
    await in_thread(_check_bases, args.base)
    guest = await QemuWorkload.start(
        args.name,
        command,
        incoming=True,
        detach=args.detach,
        hugetlb=args.hugetlb,
        clone=args.memory == "shared",
    )

    async def prepare(hello: messages.Hello) -> Migratable:
        if hello.kind != "qemu":
            raise UsageError(
                f"cannot receive {hello.name}: its kind is {hello.kind}, and this receiver expects a QEMU guest"
            )
        await guest.check_source(hello.details)
        return guest

    destination = _destination(args, connections, prepare, out, guest)
    try:
        async with _received(args, destination, out) as finishing:
            if args.detach:
                await finishing
                guest.close()
                return 0
            await run_in_foreground(guest, command[0])
            return 0
    except BaseException:
        if not destination.accepted:  # once it has accepted a source, the destination stops the guest
            await asyncio.shield(guest.discard())
        raise


def _check_bases(paths: Sequence[str]) -> None:
    """Raise ImageError, before QEMU is started, if a path of `--base` is neither an image nor a directory."""
    for path in map(Path, paths):
        if not path.is_dir():
            ImageFile(path)


async def _receive_ledger(args: argparse.Namespace, connections: ConnectionListener, out: Reporter) -> int:
    received: list[LedgerWorkload] = []
    moved = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def prepare(hello: messages.Hello) -> Migratable:
        arena = arena_for(hello, args.max_size)
        fresh = type(arena).from_file(arena.descriptor, arena.length, private=True)
        postcopy = hello.mode != "precopy"
        ledger = LedgerWorkload(fresh, on_moved=lambda: loop.call_soon_threadsafe(moved.set), postcopy=postcopy)
        fresh.register(args.name)
        received.append(ledger)
        return ledger

    destination = _destination(args, connections, prepare, out)
    async with _received(args, destination, out) as finishing:
        with contextlib.suppress(asyncio.CancelledError):  # SIGTERM and Ctrl-C end the workload
            await moved.wait()
            # The workload may already have migrated to another host. Its source must still be informed of the end of
            # this migration.
            await asyncio.wait({finishing}, timeout=args.timeout)
    ledger = received[-1]
    ledger.stop()
    report = await in_thread(ledger.verify)
    out.final(LedgerResult(args.name, report.intact, report.writes, report.checked))
    return 0 if report.intact else 1


@contextlib.asynccontextmanager
async def _received(
    args: argparse.Namespace, destination: Destination, out: Reporter
) -> AsyncIterator[asyncio.Task[None]]:
    """Receive the workload. This host owns the workload when the block begins.

    Yield the task that informs the source of the end of the migration. The task is cancelled at the end of the block.
    """
    out.event(Listening(args.name, str(destination.connections.address)))
    try:
        workload = await _run(destination)
        total, phases = destination.times.milliseconds("total"), destination.times.phase_milliseconds()
        out.event(Received(args.name, workload.identity.kind, destination.stays_paused, total, phases))
        _heed_cancellation()
        finishing = asyncio.create_task(destination.finish())
        try:
            yield finishing
        finally:
            finishing.cancel()
            await asyncio.gather(finishing, return_exceptions=True)
    finally:
        destination.close()


async def _run(destination: Destination) -> Migratable:
    try:
        return await destination.run()
    except BaseException as error:
        if destination.prepared and not destination.acknowledged.is_set():
            log.warning("the source may not know the outcome: waiting for its recovery request (Ctrl-C stops waiting)")
            _heed_cancellation()
            await destination.acknowledged.wait()
        if isinstance(error, ConnectionLost | PeerRefused | ProtocolError):
            raise type(error)(
                f"{error}. The workload remains at its source; this host has discarded its memory"
            ) from error
        raise


def _heed_cancellation() -> None:
    """Make the next await raise CancelledError if a cancellation has been suppressed (see `ignoring_cancellation`)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        task.cancel()
