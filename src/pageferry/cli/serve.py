"""`pageferry serve`: load the memory of VMs from an image."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.cli.options import given
from pageferry.control.serving import serve_async
from pageferry.errors import RestoreError
from pageferry.pager.firecracker.events import ServeResult
from pageferry.report.reporter import open_reporter
from pageferry.stores.options import OpenOptions


async def run(args: argparse.Namespace) -> int:
    """Serve until the requested number of microVMs have ended. Return the exit code of RestoreError if one of them was
    killed or stopped."""
    with open_reporter(args.output, lambda: report.ServeView()) as reporter:
        result = await serve_async(
            args.image,
            firecracker=args.firecracker,
            cloud_hypervisor=args.cloud_hypervisor,
            detach=args.detach,
            listener=reporter.event,
            eager=args.eager,
            prefetch=not args.no_prefetch,
            on_failure=args.on_failure,
            microvms=args.microvms,
            on_demand=args.on_demand,
            paused=args.paused,
            **given(args, OpenOptions),
        )
        reporter.final(result)
    return RestoreError.exit_code if isinstance(result, ServeResult) and result.failed else 0
