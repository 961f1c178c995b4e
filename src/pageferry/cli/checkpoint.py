"""`pageferry checkpoint`: save a running workload to an image file."""

from __future__ import annotations

import argparse
from pathlib import Path

from pageferry import report, values
from pageferry.checkpoints.cloud_hypervisor import save_vm
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
    _check_selection(args)
    place, parent = target("image", args.image, options), values.optional(image_argument, "parent", args.parent)
    if args.cloud_hypervisor is not None:
        api = values.path("api_socket", args.cloud_hypervisor)
        with open_reporter(args.output, lambda: report.CheckpointView()) as out:
            out.final(await save_vm(api, place, args.preserve_source, parent, options, out.event))
        return 0
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


def _check_selection(args: argparse.Namespace) -> None:
    """Raise UsageError unless exactly one workload is selected, by its name or by the API socket of its monitor."""
    if (args.name is None) == (args.cloud_hypervisor is None):
        raise UsageError("invalid workload: expected either NAME or --cloud-hypervisor")
    if args.cloud_hypervisor is None and args.preserve_source:
        raise UsageError("--preserve-source requires --cloud-hypervisor: other workloads are always kept; omit it")
    if args.cloud_hypervisor is not None and args.regions is not None:
        raise UsageError("--regions requires a process (pid:N); omit it")


async def _save(
    args: argparse.Namespace, workload: Saveable, place: Target, parent: str | Path | None, options: Options
) -> None:
    with open_reporter(args.output, lambda: report.CheckpointView()) as out:
        out.final(await save(workload, place, parent, options, out.event))
