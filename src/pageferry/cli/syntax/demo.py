"""Arguments of `pageferry demo`."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options
from pageferry.demo.options import DemoOptions
from pageferry.migration.options import Options


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Start a workload that writes to memory continuously and records every write. Migrate it to another process "
        "while it writes, let it run in that process, and compare every page with the records. Takes a few seconds."
    )
    add_options(parser, DemoOptions)
    add_options(parser, Options)
