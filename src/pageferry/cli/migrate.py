"""`pageferry migrate`: migrate a running workload to a receiver."""

from __future__ import annotations

import argparse

from pageferry import values
from pageferry.cli.arguments import integer, milliseconds, rate, seconds
from pageferry.errors import UsageError
from pageferry.host.registry import Registry
from pageferry.migration import api, switchover_request
from pageferry.migration.events import Recovered
from pageferry.migration.options import Options
from pageferry.migration.transport.messages import Owner
from pageferry.report.migration import MigrationView
from pageferry.report.reporter import open_reporter
from pageferry.workloads.open import open_workload
from pageferry.workloads.protocols import Migratable

WORKS_ON = "name"
DEFAULTS = Options()


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Migrate a running workload to `pageferry receive` on another host. Memory is copied in rounds; each round "
        "sends the pages that were modified during the previous one. When few pages remain, the workload is paused, "
        "these pages and its state are sent, and it resumes at the destination. Any failure before that leaves it "
        "running at the source. With --mode postcopy or hybrid, it resumes before all of its memory is sent, and "
        "the remaining pages are fetched on demand. If the connection is lost then, it waits for --recover."
    )
    parser.add_argument("name", metavar="NAME", help="workload to migrate (see `pageferry list`)")
    parser.add_argument("address", metavar="ADDRESS", nargs="?", help="address of the receiver: unix:PATH or HOST:PORT")
    add_options(parser)
    parser.add_argument(
        "--switch",
        action="store_true",
        help="switch a running migration of NAME with --mode hybrid to post-copy now",
    )
    after = parser.add_argument_group("recovery").add_mutually_exclusive_group()
    after.add_argument(
        "--recover",
        action="store_true",
        help="ask the receiver which side owns the workload, and complete or undo the migration; in post-copy, "
        "send the remaining pages",
    )
    after.add_argument(
        "--take-back",
        action="store_true",
        help="resume the workload on this host; only if the receiver does not run it and never will",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pageferry.migration.options.Options`."""
    _add_copying(parser.add_argument_group("copying"))
    _add_placement(parser.add_argument_group("memory at the destination"))
    _add_connection(parser.add_argument_group("connection"))


def _add_copying(copying: argparse._ArgumentGroup) -> None:
    copying.add_argument(
        "--mode",
        choices=("precopy", "postcopy", "hybrid"),
        default=DEFAULTS.mode,
        help="pages sent before the workload resumes at the destination: all (precopy), none (postcopy), or all until "
        "the rounds stop converging or --switch is given (hybrid) (default: %(default)s)",
    )
    copying.add_argument(
        "--max-downtime",
        type=milliseconds,
        default=values.duration_text(DEFAULTS.max_downtime),
        metavar="DURATION",
        help="switch over when the remaining pages can be sent in this time, such as 300ms or 1s; a plain number is in "
        "milliseconds (default: %(default)s)",
    )
    copying.add_argument(
        "--max-rounds",
        type=integer,
        default=DEFAULTS.max_rounds,
        metavar="N",
        help="fail if the workload cannot switch over after N rounds (default: %(default)s)",
    )
    copying.add_argument(
        "--auto-converge",
        action="store_true",
        help="throttle the CPU time of the workload in steps while the rounds do not converge (control groups)",
    )
    copying.add_argument(
        "--trace-granularity",
        choices=("4K", "2M", "auto"),
        default=DEFAULTS.trace_granularity,
        help="unit of the write trace: base pages, huge pages, or adapted to the writes (default: %(default)s)",
    )
    copying.add_argument(
        "--codec",
        choices=("none", "lz4", "zstd"),
        default=DEFAULTS.codec,
        help="compression of page blocks (default: %(default)s)",
    )
    copying.add_argument(
        "--adaptive", action="store_true", help="do not compress while the link is faster than --codec"
    )
    copying.add_argument(
        "--bandwidth",
        type=rate,
        default=DEFAULTS.bandwidth,
        metavar="SIZE",
        help="limit for all page streams together, in bytes per second, such as 100M (default: unlimited)",
    )
    copying.add_argument(
        "--streams",
        type=integer,
        default=DEFAULTS.streams,
        metavar="N",
        help="number of parallel page streams (default: %(default)s)",
    )


def _add_placement(placement: argparse._ArgumentGroup) -> None:
    placement.add_argument(
        "--large-pages",
        choices=("keep", "ignore"),
        default=DEFAULTS.large_pages,
        help="preserve huge pages at the destination, or ignore them (default: %(default)s)",
    )
    placement.add_argument(
        "--populate",
        choices=("all", "hot", "none"),
        default=DEFAULTS.populate,
        help="page-table entries created before the workload resumes: of all pages, during the transfer; of the pages "
        "modified during the migration (hot); or none (default: %(default)s)",
    )


def _add_connection(connection: argparse._ArgumentGroup) -> None:
    connection.add_argument(
        "--timeout",
        type=seconds,
        default=values.duration_text(DEFAULTS.timeout),
        metavar="DURATION",
        help="fail when the peer has been silent for DURATION, such as 30s or 1m; a plain number is in seconds "
        "(default: %(default)s)",
    )
    connection.add_argument(
        "--tls",
        metavar="DIR",
        help="use TLS 1.3, and require a certificate of the receiver; DIR contains ca-cert.pem, ca-crl.pem (optional), "
        "client-cert.pem and client-key.pem, as for QEMU",
    )
    connection.add_argument(
        "--tls-hostname", metavar="NAME", help="name to expect in the receiver's certificate (default: HOST)"
    )
    connection.add_argument(
        "--insecure", action="store_true", help="allow unencrypted connections to addresses other than loopback"
    )


def options_of(args: argparse.Namespace) -> dict[str, object]:
    """Return the keyword arguments of `Options` from the options that `add_options` defines."""
    return {name: getattr(args, name) for name in Options.__dataclass_fields__}


async def run(args: argparse.Namespace) -> int:
    """Migrate the workload, recover it, take it back, or switch a running migration to post-copy."""
    Options(**options_of(args))  # type: ignore[arg-type]  # checked before anything happens
    if args.switch:
        switchover_request.request(Registry().folder(args.name))
        return 0
    workload = await open_workload(args.name)
    folder = Registry().folder(args.name)
    try:
        if args.recover or args.take_back:
            return await _recover(args, workload)
        if args.address is None:
            raise UsageError(
                "ADDRESS is missing: give the address of a receiver (unix:PATH or HOST:PORT), or --recover"
            )
        with folder.exclusively(f"a migration to {args.address}"), open_reporter(args.output, MigrationView()) as out:
            result = await api.migrate_async(workload, args.address, listener=out.event, **options_of(args))
            out.final(result)
    finally:
        workload.close()
    return 0


async def _recover(args: argparse.Namespace, workload: Migratable) -> int:
    folder = Registry().folder(args.name)
    with folder.exclusively("a recovery"), open_reporter(args.output, MigrationView()) as out:
        if args.take_back:
            await api.take_back_async(workload)
            owner: Owner = "source"
        else:
            owner = await api.recover_async(
                workload,
                timeout=args.timeout,
                insecure=args.insecure,
                tls=args.tls,
                tls_hostname=args.tls_hostname,
                listener=out.event,
            )
        paused = not await workload.running() if owner == "source" else None
        out.final(Recovered(args.name, owner, paused))
    return 0
