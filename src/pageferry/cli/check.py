"""`pageferry check`: test kernel features and permissions, and suggest remedies."""

from __future__ import annotations

import argparse

from pageferry.errors import UnsupportedError
from pageferry.host.check import check
from pageferry.report.check import CheckView
from pageferry.report.reporter import open_reporter


def configure(parser: argparse.ArgumentParser) -> None:
    """Set the description; the verb has no arguments."""
    parser.description = (
        "Test every kernel feature that pageferry uses, on private memory. Print the features that this user can use, "
        "the mechanism that each system will use, and a remedy for each missing feature. No setting of the host is "
        "changed. The exit code is 0 if live migration can run here (of guests too, if a QEMU is in PATH), else 3."
    )


def run(args: argparse.Namespace) -> int:
    """Print the report. Raises UnsupportedError if live migration cannot run on this host."""
    result = check()
    with open_reporter(args.output, CheckView()) as reporter:
        reporter.final(result)
    if result.reason is not None:
        raise UnsupportedError(result.reason)
    return 0
