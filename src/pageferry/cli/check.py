"""`pageferry check`: test kernel features and permissions, and suggest remedies."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.errors import UnsupportedError
from pageferry.host.check import check
from pageferry.report.reporter import open_reporter


def run(args: argparse.Namespace) -> int:
    """Check this host, and print the report. Raises UnsupportedError if live migration cannot run on this host."""
    result = check()
    with open_reporter(args.output, lambda: report.CheckView()) as reporter:
        reporter.final(result)
    if result.reason is not None:
        raise UnsupportedError(result.reason)
    return 0
