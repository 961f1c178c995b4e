"""Arguments of `pageferry sharing`."""

from __future__ import annotations

import argparse

from pageferry.cli.arguments import integer, seconds
from pageferry.cli.options import add_options
from pageferry.sharing.options import Options

WORKS_ON = "names"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Find base pages with duplicate contents: zero pages, pages of one pattern, and identical pages within "
        "a workload and between the given workloads. Print the memory that merging them would free, as a function of "
        "the number of huge pages that must be split. With --apply, split the huge pages that reach --threshold, and "
        "merge: KSM merges private memory of these huge pages only; zero pages of the files of guests and arenas are "
        "punched out. Workloads share pages with each other only if they are given together: see the note on side "
        "channels in docs/systems/s9.md."
    )
    parser.add_argument(
        "names", metavar="NAME|pid:N", nargs="+", help="workloads (see `pageferry list`) or processes (pid:N)"
    )
    acting = parser.add_mutually_exclusive_group()
    acting.add_argument(
        "--apply", action="store_true", help="merge duplicate pages; without this option, only print the estimate"
    )
    acting.add_argument("--undo", action="store_true", help="undo sharing, and allow huge pages again")
    _add_selection(parser.add_argument_group("selection"))
    add_options(parser, Options)
    _add_watching(parser.add_argument_group("repetition"))


def _add_selection(choosing: argparse._ArgumentGroup) -> None:
    choosing.add_argument(
        "--threshold",
        type=integer,
        metavar="N",
        help="split huge pages of which at least N of the 512 base pages can be shared (default: 256 if at least half "
        "of the host's memory is available, falling to 16 at one tenth)",
    )
    choosing.add_argument(
        "--max-large-pages",
        type=integer,
        metavar="N",
        help="split at most N huge pages, those with the most duplicates",
    )
    choosing.add_argument(
        "--break-hot",
        action="store_true",
        help="also split huge pages that are in use; by default, --apply samples the activity first (as `pageferry "
        "large-pages` does), and leaves huge pages in use intact",
    )
    choosing.add_argument(
        "--merge-with-others",
        action="store_true",
        help="use KSM even if other processes have mergeable memory (as QEMU has without mem-merge=off); KSM then "
        "merges that memory with the memory of the given workloads",
    )


def _add_watching(watching: argparse._ArgumentGroup) -> None:
    watching.add_argument(
        "--watch", action="store_true", help="scan repeatedly until interrupted, faster when memory is scarce"
    )
    watching.add_argument(
        "--interval",
        type=seconds,
        default="60s",
        metavar="DURATION",
        help="time between scans, such as 30s or 1m; a plain number is in seconds (default: %(default)s)",
    )
