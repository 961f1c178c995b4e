"""`pageferry cache`: list or remove the images that restores from stores have downloaded."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.control.cache import clear_cache, list_cache
from pageferry.report.reporter import open_reporter


def run(args: argparse.Namespace) -> int:
    """Run the requested operation, and print its result."""
    with open_reporter(args.output, lambda: report.CacheView()) as out:
        out.final(list_cache() if args.what == "list" else clear_cache())
    return 0
