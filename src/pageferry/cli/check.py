"""`pageferry check`: test kernel features and permissions, and suggest remedies."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.errors import StoreError, UnsupportedError
from pageferry.host.check import check
from pageferry.report.reporter import open_reporter


def run(args: argparse.Namespace) -> int:
    """Check this host, and print the report. Raises UnsupportedError if live migration cannot run on this host. With
    `--store`, check a store; raises StoreError if it cannot be used."""
    if args.store is not None:
        return _check_store(args)
    result = check()
    with open_reporter(args.output, lambda: report.CheckView()) as reporter:
        reporter.final(result)
    if result.reason is not None:
        raise UnsupportedError(result.reason)
    return 0


def _check_store(args: argparse.Namespace) -> int:
    from pageferry.control.stores import check_store  # the check of the host needs no stores

    found = check_store(args.store)
    with open_reporter(args.output, lambda: report.CheckView()) as reporter:
        reporter.final(found)
    if found.reason is not None:
        raise StoreError(found.reason)
    return 0
