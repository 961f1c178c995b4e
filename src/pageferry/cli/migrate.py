"""`pageferry migrate`: move a workload of this host to a receiver."""

from __future__ import annotations

import argparse

from pageferry.cli.arguments import integer, milliseconds, rate, seconds
from pageferry.errors import UsageError
from pageferry.events import Event
from pageferry.host.registry import Registry
from pageferry.migration import api, switch
from pageferry.migration.messages import Owner
from pageferry.migration.options import Options
from pageferry.report.migration import MigrationView
from pageferry.report.reporter import open_reporter
from pageferry.workloads.base import Workload
from pageferry.workloads.opening import open_workload

WORKS_ON = "name"
DEFAULTS = Options()


class Recovered(Event, frozen=True, tag="recovery"):
    """What became of a migration that was in doubt."""

    workload: str
    owner: str
    """`source` (it is here again) or `destination` (it is there)."""
    paused: bool | None = None
    """Whether it is paused here, because its user had paused it; None: it is not here."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = (
        "Moves a running workload to `pageferry receive` on another host, while it runs: memory is copied in rounds, "
        "each of what was modified in the one before, until the rest is small; then the workload is paused, the rest "
        "and its state are sent, and it runs on at the other end. Any failure before that leaves it running here. With "
        "--mode postcopy or hybrid it runs at the other end before all of its memory is there; the rest is brought on "
        "access. If the link goes meanwhile it waits: see --recover."
    )
    parser.add_argument("name", metavar="NAME", help="workload to move (see `pageferry list`)")
    parser.add_argument(
        "address", metavar="ADDRESS", nargs="?", help="where the receiver listens: unix:PATH or HOST:PORT"
    )
    add_options(parser)
    parser.add_argument(
        "--switch",
        action="store_true",
        help="tell a migration of it with --mode hybrid, which is under way, to go over to post-copy now",
    )
    after = parser.add_argument_group("after a commit without an answer").add_mutually_exclusive_group()
    after.add_argument(
        "--recover",
        action="store_true",
        help="ask the receiver what became of it, and act on that; in post-copy, send the pages that it waits for",
    )
    after.add_argument(
        "--take-back",
        action="store_true",
        help="run it here again; only if you know that the receiver does not run it and never will",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `pageferry.migration.options.Options`."""
    _add_copying(parser.add_argument_group("copying"))
    _add_arriving(parser.add_argument_group("at the destination"))
    _add_link(parser.add_argument_group("link"))


def _add_copying(copying: argparse._ArgumentGroup) -> None:
    copying.add_argument(
        "--mode",
        choices=("precopy", "postcopy", "hybrid"),
        default=DEFAULTS.mode,
        help="what is copied before it runs at the other end: all, nothing, or all until that gets no further or "
        "--switch is given (%(default)s)",
    )
    copying.add_argument(
        "--max-downtime",
        type=milliseconds,
        default=DEFAULTS.max_downtime,
        metavar="DURATION",
        help="switch over when the rest can be sent in this time, such as 300ms or 1s; a number alone counts "
        "milliseconds (default: 300ms)",
    )
    copying.add_argument(
        "--max-rounds",
        type=integer,
        default=DEFAULTS.max_rounds,
        metavar="N",
        help="give up after N rounds (%(default)s)",
    )
    copying.add_argument(
        "--auto-converge",
        action="store_true",
        help="slow the workload down in steps where rounds get no further, by a limit on its CPU time (control groups)",
    )
    copying.add_argument(
        "--trace-granularity",
        choices=("4K", "2M", "auto"),
        default=DEFAULTS.trace_granularity,
        help="unit in which modified memory is traced: small pages, large pages, or as it is written (%(default)s)",
    )
    copying.add_argument("--codec", choices=("none", "lz4", "zstd"), default=DEFAULTS.codec, help="(%(default)s)")
    copying.add_argument(
        "--adaptive", action="store_true", help="leave the codec out for as long as the link is faster than it"
    )
    copying.add_argument(
        "--bandwidth",
        type=rate,
        default=DEFAULTS.bandwidth,
        metavar="SIZE",
        help="most bytes per second, over all page streams together, such as 100M (no limit)",
    )
    copying.add_argument(
        "--streams", type=integer, default=DEFAULTS.streams, metavar="N", help="parallel page streams (%(default)s)"
    )


def _add_arriving(arriving: argparse._ArgumentGroup) -> None:
    arriving.add_argument(
        "--large-pages",
        choices=("keep", "ignore"),
        default=DEFAULTS.large_pages,
        help="whether a large page here must be one there (%(default)s)",
    )
    arriving.add_argument(
        "--populate",
        choices=("all", "hot", "none"),
        default=DEFAULTS.populate,
        help="page-table entries made before it runs there: all, during the transfer; those of the pages modified "
        "during the migration; or none (%(default)s)",
    )


def _add_link(link: argparse._ArgumentGroup) -> None:
    link.add_argument(
        "--timeout",
        type=seconds,
        default=DEFAULTS.timeout,
        metavar="DURATION",
        help="silence that ends it, such as 10s or 1m; a number alone counts seconds (30s)",
    )
    link.add_argument(
        "--tls",
        metavar="DIR",
        help="send everything under TLS 1.3, to a receiver that shows a certificate; DIR has ca-cert.pem, ca-crl.pem "
        "(optional), client-cert.pem and client-key.pem, as for QEMU",
    )
    link.add_argument(
        "--tls-hostname", metavar="NAME", help="name that the receiver's certificate must have (default: that of HOST)"
    )
    link.add_argument("--insecure", action="store_true", help="allow addresses other than loopback, in the clear")


def options_of(args: argparse.Namespace) -> dict[str, object]:
    """The keyword arguments of `Options` that `add_options` parsed."""
    return {name: getattr(args, name) for name in Options.__dataclass_fields__}


async def run(args: argparse.Namespace) -> int:
    """Migrate, recover, take back, or tell a migration to switch over."""
    Options(**options_of(args))  # type: ignore[arg-type]  # before anything happens
    if args.switch:
        switch.request(Registry().folder(args.name))
        return 0
    workload = await open_workload(args.name)
    folder = Registry().folder(args.name)
    try:
        if args.recover or args.take_back:
            return await _settle(args, workload)
        if args.address is None:
            raise UsageError("where to? Give the address of a receiver (unix:PATH or HOST:PORT), or --recover")
        with folder.exclusively(f"a migration to {args.address}"), open_reporter(args.output, MigrationView()) as out:
            result = await api.migrate(workload, args.address, listener=out.event, **options_of(args))
            out.final(result)
    finally:
        workload.close()
    return 0


async def _settle(args: argparse.Namespace, workload: Workload) -> int:
    folder = Registry().folder(args.name)
    with folder.exclusively("a recovery"), open_reporter(args.output, MigrationView()) as out:
        if args.take_back:
            await api.take_back(workload)
            owner: Owner = "source"
        else:
            owner = await api.recover(
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
