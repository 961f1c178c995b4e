"""Arguments of `pageferry large-pages`."""

from __future__ import annotations

import argparse

from pageferry.cli.arguments import integer
from pageferry.cli.options import add_options
from pageferry.large_pages.options import Options
from pageferry.large_pages.policy import Threshold

WORKS_ON = "target"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Sample the huge pages of a running workload or of any process. The mapping of each sampled page is split for "
        "a short window, so that accesses to its base pages can be counted, and then restored. The huge page itself "
        "stays intact. Print the number of base pages accessed per sample, and an estimate of the idle memory."
    )
    parser.add_argument("target", metavar="NAME|pid:N", help="workload (see `pageferry list`) or any process")
    add_options(parser, Options)
    parser.add_argument("--watch", action="store_true", help="sample repeatedly until interrupted")
    parser.add_argument("--undo", action="store_true", help="reload all pages from the store, onto huge pages")
    policy = parser.add_argument_group("policy")
    policy.add_argument(
        "--threshold",
        type=integer,
        default=Threshold().activity,
        metavar="N",
        help="split huge pages of which at most N of the 512 base pages were accessed (default: %(default)s)",
    )
    policy.add_argument(
        "--sharing",
        action="store_true",
        help="search for duplicate pages first (as `pageferry sharing` does): while memory is scarce, also split huge "
        "pages above the threshold if half of their base pages have duplicates",
    )
