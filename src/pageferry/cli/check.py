"""`pageferry check`: what this kernel and this user allow, and what to do about what is missing."""

from __future__ import annotations

import argparse

from pageferry.errors import UnsupportedError
from pageferry.host.check import check
from pageferry.report.check import CheckView
from pageferry.report.reporter import open_reporter


def configure(parser: argparse.ArgumentParser) -> None:
    """The description; there are no arguments."""
    parser.description = (
        "Tries every kernel feature that pageferry uses, on memory of its own, and says what works for this user, which"
        " mechanism each system will use, and what to do about what is missing. Changes no setting of the machine."
        " Exit code 0 when live migration can run here (of guests too, if there is a QEMU in PATH), 3 otherwise."
    )


def run(args: argparse.Namespace) -> int:
    """Report, then fail with UnsupportedError where the main job cannot run."""
    result = check()
    with open_reporter(args.output, CheckView()) as reporter:
        reporter.final(result)
    if result.reason is not None:
        raise UnsupportedError(result.reason)
    return 0
