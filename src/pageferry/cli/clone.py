"""`pageferry clone`: start several QEMU guests from one image at the same time."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.checkpoints.clone import start_clones
from pageferry.checkpoints.clone_options import CloneOptions
from pageferry.cli.foreground import run_all_in_foreground
from pageferry.cli.options import given
from pageferry.errors import UsageError
from pageferry.report.reporter import open_reporter
from pageferry.stores.options import OpenOptions


async def run(args: argparse.Namespace) -> int:
    """Start the guests, and unless `--detach` is given, wait until all of them have exited. Raises WorkloadError if a
    QEMU fails or is killed."""
    if not args.command:
        raise UsageError(
            "cannot start guests: the command line of QEMU is missing; give IMAGE --count N -- QEMU ARGS..."
        )
    options = CloneOptions(
        count=args.count,
        name=args.name,
        memory=args.memory,
        eager=args.eager,
        prefetch=not args.no_prefetch,
        disks=args.disks,
        clock=args.clock,
        **given(args, OpenOptions),
    )
    with open_reporter(args.output, lambda: report.CloneView()) as reporter:
        workloads, result = await start_clones(args.image, args.command, options, reporter.event)
        reporter.final(result)
    if args.detach:
        for workload in workloads:
            workload.close()
        return 0
    await run_all_in_foreground(workloads, args.command[0])
    return 0
