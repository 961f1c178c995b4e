"""Arguments of `pageferry demo`."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options
from pageferry.demo.options import DemoOptions
from pageferry.migration.options import Options

INAPPLICABLE = ("disks", "copy_disks", "memory", "tls", "tls_hostname", "insecure")
"""Options of a migration that the demo does not have: its workload has no disks and is not a clone, and its receiver
has a Unix socket."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Start a workload that writes to memory continuously and records every write. Migrate it to another process "
        "while it writes, let it run in that process, and compare every page with the records. The demo takes a few "
        "seconds."
    )
    add_options(parser, DemoOptions)
    add_options(parser, Options, without=INAPPLICABLE)
