"""`pageferry migrate`: migrate a running workload to a receiver."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options, given
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
    add_options(parser, Options)
    parser.add_argument(
        "--switch",
        action="store_true",
        help="switch a running migration of NAME with --mode hybrid to post-copy now",
    )
    _add_recovery(parser)


def _add_recovery(parser: argparse.ArgumentParser) -> None:
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


async def run(args: argparse.Namespace) -> int:
    """Migrate the workload, recover it, take it back, or switch a running migration to post-copy."""
    options = given(args, Options)
    Options(**options)  # checked before anything happens
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
            result = await api.migrate_async(workload, args.address, listener=out.event, **options)
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
