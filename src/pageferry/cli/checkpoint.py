"""`pageferry checkpoint`: save a running workload to an image file."""

from __future__ import annotations

import argparse
from pathlib import Path

from pageferry import report, values
from pageferry.checkpoints.image_source import image_argument
from pageferry.checkpoints.options import Options
from pageferry.checkpoints.save import save
from pageferry.checkpoints.target import Target, target
from pageferry.cli.options import given
from pageferry.errors import UsageError
from pageferry.host.registry import Registry
from pageferry.report.reporter import open_reporter
from pageferry.workloads.open import open_workload
from pageferry.workloads.process import PREFIX, ProcessWorkload
from pageferry.workloads.protocols import Saveable


async def run(args: argparse.Namespace) -> int:
    """Save the workload or process, and print the result."""
    options = Options(**given(args, Options))  # raises UsageError before any other work
    place, parent = target("image", args.image, options), values.optional(image_argument, "parent", args.parent)
    if args.name.startswith(PREFIX):
        process = ProcessWorkload.named(args.name, args.regions)
        try:
            await _save(args, process, place, parent, options)
        finally:
            process.close()
        return 0
    if args.regions is not None:
        raise UsageError(
            "--regions requires a process (pid:N): a checkpoint of a guest or an arena always contains all of its "
            "memory; omit --regions"
        )
    workload = await open_workload(args.name)
    try:
        with Registry().folder(args.name).exclusively(f"a checkpoint to {args.image}"):
            await _save(args, workload, place, parent, options)
    finally:
        workload.close()
    return 0


async def _save(
    args: argparse.Namespace, workload: Saveable, place: Target, parent: str | Path | None, options: Options
) -> None:
    with open_reporter(args.output, lambda: report.CheckpointView()) as out:
        out.final(await save(workload, place, parent, options, out.event))
