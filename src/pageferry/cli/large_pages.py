"""`pageferry large-pages`: estimate how much of each huge page is used, and reclaim cold memory."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from pageferry import values
from pageferry.cli.arguments import fraction, integer, seconds
from pageferry.density import shareable_pages
from pageferry.errors import UsageError
from pageferry.large_pages.api import Options, sample_async, undo_async
from pageferry.large_pages.events import LargePagesResult
from pageferry.large_pages.policy import Threshold
from pageferry.report.large_pages import LargePagesView
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.workloads.target import Target, open_target_async

WORKS_ON = "target"
DEFAULTS = Options()


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Sample the huge pages of a running workload or of any process. The mapping of each sampled page is split for "
        "a short window, so that accesses to its base pages can be counted, and then restored. The huge page itself "
        "stays intact. Print the number of base pages accessed per sample, and an estimate of the idle memory."
    )
    parser.add_argument("target", metavar="NAME|pid:N", help="workload (see `pageferry list`) or any process")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--sample",
        type=fraction,
        default=DEFAULTS.sample,
        metavar="FRACTION",
        help="maximum fraction of the huge pages to sample per round (default: %(default)s)",
    )
    sampling.add_argument(
        "--window",
        type=seconds,
        default=values.duration_text(DEFAULTS.window),
        metavar="DURATION",
        help="time during which accesses are counted, such as 200ms or 1s; a plain number is in seconds "
        "(default: %(default)s)",
    )
    sampling.add_argument(
        "--rounds",
        type=integer,
        default=DEFAULTS.rounds,
        metavar="N",
        help="number of rounds, each with other samples (default: %(default)s)",
    )
    sampling.add_argument(
        "--budget",
        type=fraction,
        default=DEFAULTS.budget,
        metavar="FRACTION",
        help="limit for sampling, as a fraction of one CPU; the number of samples is reduced to stay below it; 0: "
        "unlimited (default: %(default)s)",
    )
    sampling.add_argument("--watch", action="store_true", help="sample repeatedly until interrupted")
    acting = parser.add_argument_group("reclaiming")
    acting.add_argument(
        "--threshold",
        type=integer,
        default=Threshold().activity,
        metavar="N",
        help="split huge pages of which at most N of the 512 base pages were accessed (default: %(default)s)",
    )
    acting.add_argument(
        "--sharing",
        action="store_true",
        help="search for duplicate pages first (as `pageferry sharing` does): while memory is scarce, also split huge "
        "pages above the threshold if half of their base pages have duplicates",
    )
    acting.add_argument(
        "--reclaim",
        choices=("store", "swap"),
        help="split these pages and move their cold base pages to swap, or (guests and arenas) to a compressed store "
        "from which they are reloaded on demand",
    )
    acting.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="directory for the store (default: that of the workload in the run directory, usually a tmpfs)",
    )
    acting.add_argument(
        "--codec",
        choices=("none", "lz4", "zstd"),
        default=DEFAULTS.codec,
        help="compression of the store (default: %(default)s)",
    )
    acting.add_argument("--undo", action="store_true", help="reload all pages from the store, onto huge pages")


async def run(args: argparse.Namespace) -> int:
    """Sample once or until interrupted, and reclaim if requested."""
    if args.sharing and args.watch:
        raise UsageError("--sharing cannot be combined with --watch: remove one of them")
    if args.undo and (args.watch or args.reclaim):
        raise UsageError("--undo cannot be combined with --watch or --reclaim: remove them")
    options, policy = _options(args), _policy(args)
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
        raise UsageError(f"invalid --threshold {args.threshold}: expected 0 to 512 base pages of a huge page")
    return Threshold(activity=args.threshold)
