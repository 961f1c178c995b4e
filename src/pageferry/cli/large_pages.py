"""`pageferry large-pages`: estimate how much of each huge page is used, and reclaim cold memory."""

from __future__ import annotations

import argparse
import asyncio

from pageferry import report
from pageferry.cli.options import given, refuse_others
from pageferry.density import shareable_pages
from pageferry.errors import UsageError
from pageferry.large_pages.api import sample_async, undo_async
from pageferry.large_pages.events import LargePagesResult
from pageferry.large_pages.options import Options
from pageferry.large_pages.policy import Threshold
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.workloads.target import Target, open_target_async


async def run(args: argparse.Namespace) -> int:
    """Sample huge pages once, or with `--watch` until cancelled, and reclaim cold memory if requested. With `--undo`,
    reload reclaimed memory instead."""
    if args.sharing and args.watch:
        raise UsageError("--sharing cannot be combined with --watch: remove one of them")
    if args.undo:
        refuse_others(args, ("target", "undo"), "with --undo")
    options, policy = Options(**given(args, Options)), Threshold(activity=args.threshold)
    target = await open_target_async(args.target)
    with target, open_reporter(args.output, lambda: report.LargePagesView()) as out:
        if args.undo:
            out.final(await undo_async(target))
        elif args.watch:
            await _watch(target, options, policy, out, show_last=args.output == "human")
        else:
            sharing = await shareable_pages(target) if args.sharing else None
            out.final(await sample_async(target, options, policy=policy, sharing=sharing, listener=out.event))
    return 0


async def _watch(target: Target, options: Options, policy: Threshold, out: Reporter, *, show_last: bool) -> None:
    """Sample repeatedly and emit each result until cancelled. With `show_last`, print the last result at the end."""
    result: LargePagesResult | None = None
    try:
        while True:
            result = await sample_async(target, options, policy=policy)
            out.event(result)
            await asyncio.sleep(options.window)
    finally:
        if result is not None and show_last:
            out.final(result)
