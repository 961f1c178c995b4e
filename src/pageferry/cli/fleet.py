"""`pageferry fleet`: place, move, clone and save workloads over the hosts of a Ray cluster."""

from __future__ import annotations

import argparse
from typing import Any

from pageferry import report
from pageferry.cli.options import given
from pageferry.cli.syntax.fleet import COMMANDS, OPTIONS
from pageferry.errors import FleetIncomplete, UsageError
from pageferry.events import Event
from pageferry.fleet import api
from pageferry.fleet.events import FleetCancelled, FleetResult
from pageferry.fleet.joining import join_async
from pageferry.fleet.options import JoinOptions
from pageferry.report.reporter import Reporter, open_reporter


async def run(args: argparse.Namespace) -> int:
    """Run the requested operation, and print its events and its result.

    Raises FleetIncomplete if a workload is not where the plan puts it, or a host that is concerned does not reply.
    """
    if args.command and args.what not in COMMANDS:
        raise UsageError(f"invalid arguments: `fleet {args.what}` does not take a command after --; remove it")
    options: dict[str, Any] = given(args, OPTIONS[args.what])
    with open_reporter(args.output, lambda: report.FleetView()) as out:
        if args.what == "join":
            await join_async(JoinOptions(**options), out.event)
            return 0
        result = await _perform(args, out, options)
        out.final(result)
    if isinstance(result, FleetResult | FleetCancelled) and not result.complete:
        raise FleetIncomplete(f"cannot complete `fleet {args.what}`: {'; '.join(result.failures)}")
    return 0


async def _perform(args: argparse.Namespace, out: Reporter, options: dict[str, Any]) -> Event:
    match args.what:
        case "status":
            return await api.status_async(**options)
        case "run":
            return await api.run_async(args.workload, args.command, **options)
        case "clone":
            return await api.clone_async(args.image, args.command, listener=out.event, **options)
        case "move":
            return await api.move_async(args.workload, args.host, listener=out.event, **options)
        case "evacuate":
            return await api.evacuate_async(*args.words, listener=out.event, **options)
        case "rebalance":
            return await api.rebalance_async(listener=out.event, **options)
        case "checkpoint":
            if args.all == bool(args.words):
                raise UsageError("invalid arguments: expected either --all or the names of workloads")
            return await api.checkpoint_async(args.target, *args.words, listener=out.event, **options)
        case _:
            return await api.cancel_async(*args.words, **options)
