"""Arguments of `pageferry report`."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Summarise event logs, which any verb writes with --log FILE: as text, as JSON (--output json), or as one HTML "
        "file that needs no network. Several runs are shown side by side. The log of a command that was killed is "
        "shown up to its last complete line."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="event log to summarise")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write an HTML page; an existing file is replaced")
