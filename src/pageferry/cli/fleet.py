"""`pageferry fleet`: place, move, clone and save workloads over many hosts."""

from __future__ import annotations

import argparse
from typing import Any

from pageferry import report
from pageferry.cli.options import given
from pageferry.cli.syntax.fleet import OPTIONS
from pageferry.errors import FleetIncomplete
from pageferry.fleet import api
from pageferry.fleet.events import FleetResult
from pageferry.fleet.joining import join_async
from pageferry.fleet.options import JoinOptions
from pageferry.report.reporter import open_reporter


async def run(args: argparse.Namespace) -> int:
    """Run the requested operation, and print its events and its result."""
    options: dict[str, Any] = given(args, OPTIONS[args.what])
    with open_reporter(args.output, lambda: report.FleetView()) as out:
        match args.what:
            case "join":
                await join_async(JoinOptions(**options), out.event)
                return 0
            case "status":
                out.final(await api.status_async(**options))
                return 0
            case "move":
                result = await api.move_async(args.workload, args.host, listener=out.event, **options)
        out.final(result)
    check(result)
    return 0


def check(result: FleetResult) -> None:
    """Raise FleetIncomplete if a workload is not where the plan puts it."""
    if result.complete:
        return
    raise FleetIncomplete(f"cannot complete the plan: {'; '.join(result.failures)}")
