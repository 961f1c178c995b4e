"""`pageferry checkpoint`: save a workload of this host to an image, while it runs."""

from __future__ import annotations

import argparse

from pageferry.checkpoints.options import Options
from pageferry.checkpoints.save import checkpoint
from pageferry.cli.arguments import rate, size
from pageferry.errors import UsageError
from pageferry.host.registry import Registry
from pageferry.report.checkpoint import CheckpointView
from pageferry.report.reporter import open_reporter
from pageferry.workloads.base import Workload
from pageferry.workloads.opening import open_workload
from pageferry.workloads.process import PREFIX, ProcessWorkload

WORKS_ON = "name"
DEFAULTS = Options()


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = (
        "Saves a running workload to an image: it is paused for milliseconds, for its state, and its memory as of that "
        "moment is written while it runs on. The image appears when it is complete, or not at all."
    )
    parser.add_argument("name", metavar="NAME", help="workload to save (see `pageferry list`), or pid:N")
    parser.add_argument("image", metavar="IMAGE", help="file to write; one that is there is replaced")
    parser.add_argument(
        "--parent", metavar="IMAGE", help="an earlier image of it: only what differs is stored, and it is needed then"
    )
    parser.add_argument(
        "--track",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="leave a write trace, so that the next checkpoint with this one as its --parent reads only what was "
        "written; until then the first write to each page costs a minor fault, and large pages are mapped small "
        "(default: where this one has a --parent)",
    )
    parser.add_argument(
        "--mode",
        choices=("lazy", "stop"),
        default=DEFAULTS.mode,
        help="save while the workload runs, or pause it from beginning to end (%(default)s)",
    )
    parser.add_argument(
        "--regions",
        metavar="LIST",
        help="memory of pid:N to save while it is stopped: heap, stack, anon, START-END, or several with commas; "
        "such an image can be looked at, not restored",
    )
    parser.add_argument("--codec", choices=("none", "lz4", "zstd"), default=DEFAULTS.codec, help="(%(default)s)")
    parser.add_argument(
        "--bandwidth",
        type=rate,
        default=DEFAULTS.bandwidth,
        metavar="SIZE",
        help="bytes per second to save of what is not written to meanwhile (no limit)",
    )
    sizes = parser.add_argument_group("sizes")
    for name, what in (
        ("trap_block", "copied at once when the workload writes to it"),
        ("page_block", "compressed as one"),
        ("storage_block", "read from the image as one"),
        ("staging", "copies that wait to be compressed"),
    ):
        default = getattr(DEFAULTS, name)
        flag = "--" + name.replace("_", "-")
        sizes.add_argument(flag, type=size, default=default, metavar="SIZE", help=f"{what} ({default >> 10}K)")


async def run(args: argparse.Namespace) -> int:
    """Save the workload."""
    Options(**_options(args))  # type: ignore[arg-type]  # before anything happens
    if args.name.startswith(PREFIX):
        process = ProcessWorkload.named(args.name, args.regions)
        try:
            await _save(args, process)
        finally:
            process.close()
        return 0
    if args.regions is not None:
        raise UsageError("--regions is about processes (pid:N); of other workloads all memory is saved")
    workload = await open_workload(args.name)
    try:
        with Registry().folder(args.name).exclusively(f"a checkpoint to {args.image}"):
            await _save(args, workload)
    finally:
        workload.close()
    return 0


def _options(args: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(args, name) for name in Options.__dataclass_fields__ if hasattr(args, name)}


async def _save(args: argparse.Namespace, workload: Workload | ProcessWorkload) -> None:
    options = _options(args)
    with open_reporter(args.output, CheckpointView()) as reporter:
        reporter.final(await checkpoint(workload, args.image, parent=args.parent, listener=reporter.event, **options))
