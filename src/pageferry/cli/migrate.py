"""`pageferry migrate`: migrate a running workload to a receiver."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.cli.options import given, refuse_others
from pageferry.errors import UsageError
from pageferry.host.registry import Registry
from pageferry.migration import api, switchover_request
from pageferry.migration.events import Recovered
from pageferry.migration.options import Options, RecoverOptions
from pageferry.migration.transport.messages import Owner
from pageferry.options import options_of
from pageferry.report.reporter import open_reporter
from pageferry.workloads.open import open_workload
from pageferry.workloads.protocols import Migratable


async def run(args: argparse.Namespace) -> int:
    """Migrate the workload, recover it, take it back, or switch a running migration to post-copy."""
    options = given(args, Options)
    Options(**options)  # raises UsageError before any other work
    if args.switch:
        refuse_others(args, ("name", "switch"), "with --switch")
        switchover_request.request(Registry().folder(args.name))
        return 0
    recovers = _recovers(args)
    workload = await open_workload(args.name)
    folder = Registry().folder(args.name)
    try:
        if recovers:
            return await _recover(args, workload)
        if args.address is None:
            raise UsageError(
                "cannot migrate without ADDRESS: give the address of a receiver (unix:PATH or HOST:PORT), or --recover"
            )
        with (
            folder.exclusively(f"a migration to {args.address}"),
            open_reporter(args.output, lambda: report.MigrationView()) as out,
        ):
            result = await api.migrate_async(workload, args.address, listener=out.event, **options)
            out.final(result)
    finally:
        workload.close()
    return 0


def _recovers(args: argparse.Namespace) -> bool:
    """Return whether the command recovers a migration. Raises UsageError if it would ignore an option."""
    if args.recover:
        names = [option.name for option in options_of(RecoverOptions)]
        refuse_others(args, ("name", "recover", *names), "with --recover")
    elif args.take_back:
        refuse_others(args, ("name", "take_back"), "with --take-back")
    return bool(args.recover or args.take_back)


async def _recover(args: argparse.Namespace, workload: Migratable) -> int:
    folder = Registry().folder(args.name)
    with folder.exclusively("a recovery"), open_reporter(args.output, lambda: report.MigrationView()) as out:
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
