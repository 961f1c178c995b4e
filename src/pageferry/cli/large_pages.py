"""`pageferry large-pages`: how much of each large page a workload uses, and reclaim of what it does not."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from pageferry.cli.activity import shareable_pages
from pageferry.cli.arguments import fraction, integer, seconds
from pageferry.errors import UsageError
from pageferry.large_pages.api import Options, sample, undo
from pageferry.large_pages.events import LargePagesResult
from pageferry.large_pages.policy import Threshold
from pageferry.report.large_pages import LargePagesView
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.workloads.targets import Target, open_target

WORKS_ON = "target"
DEFAULTS = Options()


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = (
        "Looks at a sample of the large pages of a running workload, or of any process: for a short window their "
        "mappings (never the pages themselves) are split, so that accesses to their small pages can be told apart, and "
        "then put back. Says how many small pages of each were accessed, and estimates how much of all is idle."
    )
    parser.add_argument("target", metavar="NAME|pid:N", help="workload (see `pageferry list`), or any process")
    looking = parser.add_argument_group("looking")
    looking.add_argument(
        "--sample", type=fraction, default=DEFAULTS.sample, metavar="PART", help="large pages per round, at most (5%%)"
    )
    looking.add_argument(
        "--window",
        type=seconds,
        default=DEFAULTS.window,
        metavar="DURATION",
        help="in which accesses count, such as 200ms or 1s; a number alone counts seconds (200ms)",
    )
    looking.add_argument("--rounds", type=integer, default=DEFAULTS.rounds, metavar="N", help="(%(default)s)")
    looking.add_argument(
        "--budget",
        type=fraction,
        default=DEFAULTS.budget,
        metavar="PART",
        help="of a CPU, for looking: samples become smaller where it would not do; 0: no limit (1%%)",
    )
    looking.add_argument("--watch", action="store_true", help="look again and again, until interrupted")
    acting = parser.add_argument_group("reclaiming")
    acting.add_argument(
        "--threshold",
        type=integer,
        default=Threshold().activity,
        metavar="N",
        help="break large pages with at most N of their 512 small pages accessed (%(default)s)",
    )
    acting.add_argument(
        "--sharing",
        action="store_true",
        help="look for equal pages first (as `pageferry sharing` does): while memory is scarce, large pages that are "
        "used more than a little are broken, too, if half of their pages have an equal elsewhere",
    )
    acting.add_argument(
        "--reclaim",
        choices=("store", "swap"),
        help="break them, and send their cold small pages to swap, or (guests and arenas) to a compressed store from "
        "which they come back on access",
    )
    acting.add_argument(
        "--store",
        type=Path,
        metavar="FOLDER",
        help="where the store goes (the workload's folder in the run directory, which mostly is memory itself)",
    )
    acting.add_argument(
        "--codec", choices=("none", "lz4", "zstd"), default=DEFAULTS.codec, help="of the store (%(default)s)"
    )
    acting.add_argument("--undo", action="store_true", help="bring all back from the store, on large pages again")


async def run(args: argparse.Namespace) -> int:
    """Look, once or until interrupted; reclaim if wanted."""
    if args.sharing and args.watch:
        raise UsageError("--sharing is for one look: leave --watch out")
    if args.undo and (args.watch or args.reclaim):
        raise UsageError("--undo stands alone: leave --watch and --reclaim out")
    options, policy = _options(args), _policy(args)
    target = await open_target(args.target)
    with target, open_reporter(args.output, LargePagesView()) as out:
        if args.undo:
            out.final(await undo(target))
        elif args.watch:
            await _watch(target, options, policy, out, show_last=args.output == "human")
        else:
            sharing = await shareable_pages(target) if args.sharing else None
            out.final(await sample(target, options, policy=policy, sharing=sharing, listener=out.event))
    return 0


async def _watch(target: Target, options: Options, policy: Threshold, out: Reporter, *, show_last: bool) -> None:
    """Result after result; on a terminal the last one stays when this is cancelled."""
    result: LargePagesResult | None = None
    try:
        while True:
            result = await sample(target, options, policy=policy)
            out.event(result)
            await asyncio.sleep(options.window)
    finally:
        if result is not None and show_last:
            out.final(result)


def _options(args: argparse.Namespace) -> Options:
    return Options(
        sample=args.sample,
        window=args.window,
        rounds=args.rounds,
        budget=args.budget or None,
        reclaim=args.reclaim,
        store=args.store,
        codec=args.codec,
    )


def _policy(args: argparse.Namespace) -> Threshold:
    if not 0 <= args.threshold <= 512:
        raise UsageError(f"a threshold of {args.threshold}: a large page has 512 small pages")
    return Threshold(activity=args.threshold)
