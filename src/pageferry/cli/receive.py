"""`pageferry receive`: wait for a workload, and run it from the moment it has arrived."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator
from logging import getLogger

import msgspec

from pageferry import values
from pageferry.cli.arguments import seconds, size
from pageferry.cli.foreground import see_to_the_end
from pageferry.errors import ConnectionLost, PeerRefused, ProtocolError, UsageError
from pageferry.events import Event
from pageferry.host.blocking import in_thread
from pageferry.host.registry import Registry
from pageferry.migration import api, events, messages
from pageferry.migration.connection import Reception
from pageferry.migration.destination import Destination, Prepare
from pageferry.migration.options import timeout
from pageferry.migration.ownership import Verdicts
from pageferry.migration.postcopy_destination import Resumption
from pageferry.report.migration import postcopy_line
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.report.text import PlainView
from pageferry.workloads.arguments import MAX_ARENA
from pageferry.workloads.base import Workload
from pageferry.workloads.ledger import LedgerWorkload
from pageferry.workloads.qemu import QemuWorkload

log = getLogger(__name__)

TAKES_COMMAND = True
WORKS_ON = "name"


class Listening(Event, frozen=True, tag="listening"):
    """Sources can connect."""

    workload: str
    address: str


class Received(Event, frozen=True, tag="received"):
    """The workload runs here, or is paused here because its user had paused it."""

    workload: str
    kind: str
    paused: bool = False


class Resumed(Event, frozen=True, tag="resumed"):
    """All of its memory is here."""

    workload: str


class LedgerResult(Event, frozen=True, tag="ledger"):
    """What became of a built-in workload: whether every write that was ever made is there."""

    workload: str
    intact: bool
    writes: int
    checked: int


class ReceiveView(PlainView):
    """Lines instead of names and values."""

    def line(self, event: msgspec.Struct) -> str | None:
        """One line per event."""
        match event:
            case Listening():
                return f"{event.workload} waits at {event.address}"
            case Received():
                return f"{event.workload} {'is here, paused as before' if event.paused else 'runs here'}"
            case events.PostcopyEvent():
                return postcopy_line(event) if event.status != "postcopy-active" else None
            case _:
                return super().line(event)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = (
        "Waits for one workload that `pageferry migrate` sends, and runs it. A QEMU is started at once with the "
        "command line given, and waits for its memory and state; it must be the same machine as at the source. With "
        "--resume, goes on for a guest that runs here already and whose receiver was killed before all of its memory "
        "had come."
    )
    parser.add_argument("name", metavar="NAME", help="name of the workload on this host")
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        help="wait at unix:PATH, for sources on this host, or at HOST:PORT, port 0 for any free one (default: a Unix "
        "socket in the run directory; with --tls or --insecure 127.0.0.1:0)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="bring the rest of the memory of a guest that is here; then `pageferry migrate --recover` at its source",
    )
    parser.add_argument("--workload", choices=("demo",), help="receive the built-in workload instead of a QEMU")
    parser.add_argument(
        "--max-size", type=size, metavar="SIZE", help="largest memory to accept (default: what is free)"
    )
    parser.add_argument("--hugetlb", action="store_true", help="guest memory on hugetlbfs")
    parser.add_argument("--detach", action="store_true", help="end when the guest runs, and leave it running")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=30.0,
        metavar="DURATION",
        help="silence that ends it, such as 10s or 1m; a number alone counts seconds (30s)",
    )
    parser.add_argument(
        "--tls",
        metavar="DIR",
        help="receive under TLS 1.3 only, from sources that show a certificate; DIR has ca-cert.pem, ca-crl.pem "
        "(optional), server-cert.pem and server-key.pem, as for QEMU",
    )
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="with --tls: let in sources whose certificate has this common or alternative name; may be given more than "
        "once (default: all sources with a certificate of the authority in ca-cert.pem)",
    )
    parser.add_argument("--insecure", action="store_true", help="allow addresses other than loopback, in the clear")
    parser.usage = "pageferry receive NAME [options] [-- QEMU ARGS...]"


async def run(args: argparse.Namespace) -> int:
    """Receive a workload, then stay until it ends."""
    command = args.command
    timeout(args.timeout)
    values.optional(values.size, "max_size", args.max_size, 1, MAX_ARENA)
    if (args.workload is not None) + bool(command) + args.resume != 1:
        raise UsageError("give either --workload demo, or --resume, or a QEMU command line after --")
    with open_reporter(args.output, ReceiveView()) as out:
        reception = api.open_reception(
            _address(args), args.timeout, insecure=args.insecure, tls=args.tls, allow=args.allow
        )
        try:
            if args.resume:
                return await _resume(args, reception, out)
            if command:
                return await _receive_guest(args, command, reception, out)
            return await _receive_ledger(args, reception, out)
        finally:
            await reception.close()


def _address(args: argparse.Namespace) -> str:
    """Where to listen: on one host, where only this user and root can connect."""
    if args.listen is not None:
        return str(args.listen)
    return "127.0.0.1:0" if args.tls or args.insecure else f"unix:{Registry().receiver_socket(args.name)}"


def _destination(
    args: argparse.Namespace, reception: Reception, prepare: Prepare, out: Reporter, guest: QemuWorkload | None = None
) -> Destination:
    registry = Registry()
    return Destination(
        reception,
        prepare,
        Verdicts(registry.path),
        args.timeout,
        folder=lambda: registry.folder(args.name),
        listener=out.event,
        ended=guest.died if guest is not None else None,
    )


async def _resume(args: argparse.Namespace, reception: Reception, out: Reporter) -> int:
    registry = Registry()
    resumption = Resumption(registry.folder(args.name), reception, Verdicts(registry.path), args.timeout, out.event)
    out.event(Listening(args.name, str(reception.address)))
    await resumption.run()
    out.final(Resumed(args.name))
    return 0


async def _receive_guest(args: argparse.Namespace, command: list[str], reception: Reception, out: Reporter) -> int:
    guest = await QemuWorkload.start(args.name, command, incoming=True, detach=args.detach, hugetlb=args.hugetlb)

    async def prepare(hello: messages.Hello) -> Workload:
        if hello.kind != "qemu":
            raise UsageError(f"{hello.name} is a workload of kind {hello.kind}; a QEMU guest is received here")
        guest.check_source(hello.details)
        return guest

    destination = _destination(args, reception, prepare, out, guest)
    try:
        async with _received(args, destination, out) as finishing:
            if args.detach:
                await finishing
                guest.close()
                return 0
            return await see_to_the_end(guest) or 0
    except BaseException:
        if not destination.accepted:  # from then on the destination sees to the guest
            await asyncio.shield(guest.discard())
        raise


async def _receive_ledger(args: argparse.Namespace, reception: Reception, out: Reporter) -> int:
    received: list[LedgerWorkload] = []
    moved = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def prepare(hello: messages.Hello) -> Workload:
        arena = api.arena_for(hello, args.max_size)
        fresh = type(arena).from_file(arena.descriptor, arena.length, private=True)
        late = hello.mode != "precopy"
        ledger = LedgerWorkload(fresh, on_moved=lambda: loop.call_soon_threadsafe(moved.set), late=late)
        fresh.register(args.name)
        received.append(ledger)
        return ledger

    destination = _destination(args, reception, prepare, out)
    async with _received(args, destination, out) as finishing:
        with contextlib.suppress(asyncio.CancelledError):  # asked to end: that is how it ends
            await moved.wait()
            # It may have moved on as soon as all of it was here: its source must hear of that, too.
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
    """Receive; within the block the workload runs here. Gives the task that ends once the source knows that."""
    out.event(Listening(args.name, str(destination.reception.address)))
    try:
        workload = await _run(destination)
        out.event(Received(args.name, workload.identity.kind, destination.stays_paused))
        _heed_cancellation()
        finishing = asyncio.create_task(destination.finish())
        try:
            yield finishing
        finally:
            finishing.cancel()
            await asyncio.gather(finishing, return_exceptions=True)
    finally:
        destination.close()


async def _run(destination: Destination) -> Workload:
    try:
        return await destination.run()
    except BaseException as error:
        if destination.promised and not destination.settled.is_set():
            log.warning("the source may be in doubt: waiting for it to ask (Ctrl-C ends the wait)")
            _heed_cancellation()
            await destination.settled.wait()
        if isinstance(error, ConnectionLost | PeerRefused | ProtocolError):
            raise type(error)(f"{error}. The workload is left to its source, and nothing of it is here") from error
        raise


def _heed_cancellation() -> None:
    """Whoever asked us to end while that could not be (see `to_the_end`) is heard at the next await."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        task.cancel()
