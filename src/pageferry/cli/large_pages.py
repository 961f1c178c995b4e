"""`pageferry large-pages`: estimate how much of each huge page is used, and reclaim cold memory."""

from __future__ import annotations

import argparse
import asyncio

from pageferry.cli.arguments import integer
from pageferry.cli.options import add_options, given
from pageferry.density import shareable_pages
from pageferry.errors import UsageError
from pageferry.large_pages.api import Options, sample_async, undo_async
from pageferry.large_pages.events import LargePagesResult
from pageferry.large_pages.policy import Threshold
from pageferry.report.large_pages import LargePagesView
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.workloads.target import Target, open_target_async

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


async def run(args: argparse.Namespace) -> int:
    """Sample once or until interrupted, and reclaim if requested."""
    if args.sharing and args.watch:
        raise UsageError("--sharing cannot be combined with --watch: remove one of them")
    if args.undo and (args.watch or args.reclaim):
        raise UsageError("--undo cannot be combined with --watch or --reclaim: remove them")
    options, policy = Options(**given(args, Options)), Threshold(activity=args.threshold)
    target = await open_target_async(args.target)
    with target, open_reporter(args.output, LargePagesView()) as out:
        if args.undo:
            out.final(await undo_async(target))
        elif args.watch:
            await _watch(target, options, policy, out, show_last=args.output == "human")
        else:
            sharing = await shareable_pages(target) if args.sharing else None
            out.final(await sample_async(target, options, policy=policy, sharing=sharing, listener=out.event))
    return 0


async def _watch(target: Target, options: Options, policy: Threshold, out: Reporter, *, show_last: bool) -> None:
    """Print results until cancelled; on a terminal, the last result remains visible."""
    result: LargePagesResult | None = None
    try:
        while True:
            result = await sample_async(target, options, policy=policy)
            out.event(result)
            await asyncio.sleep(options.window)
    finally:
        if result is not None and show_last:
            out.final(result)
