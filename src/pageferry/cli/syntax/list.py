"""Arguments of `pageferry list`."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Set the description; the verb has no arguments."""
    parser.description = (
        "List the workloads of this host: guests started by `pageferry run`, `receive` or `restore`, adopted guests, "
        "and named arenas of Python programs. With --output json, print one object of type `workload` per line."
    )
