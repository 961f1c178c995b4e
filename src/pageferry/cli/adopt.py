"""`pageferry adopt`: manage a QEMU guest that somebody else has started."""

from __future__ import annotations

import argparse

from pageferry.cli.list import describe
from pageferry.report.reporter import open_reporter
from pageferry.report.workloads import WorkloadsView
from pageferry.workloads.qemu import QemuWorkload


def configure(parser: argparse.ArgumentParser) -> None:
    """Name, and where its monitor listens."""
    parser.description = (
        "Manage a running QEMU that somebody else has started. Its memory must be in shared files: "
        "-object memory-backend-file,id=ram0,size=SIZE,share=on,align=2M,mem-path=FILE -machine memory-backend=ram0."
    )
    parser.add_argument("name", metavar="NAME", help="what to call the guest on this host")
    parser.add_argument(
        "--qmp", metavar="SOCKET", required=True, help="a QMP unix socket of its own for us (-qmp unix:)"
    )


async def run(args: argparse.Namespace) -> int:
    """Register the guest and say what it is."""
    workload = await QemuWorkload.adopt(args.name, args.qmp)
    try:
        with open_reporter(args.output, WorkloadsView()) as reporter:
            reporter.final(await describe(workload))
    finally:
        workload.close()
    return 0
