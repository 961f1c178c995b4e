"""`pageferry sharing`: find duplicate pages, inside huge pages too, and merge them where it pays off."""

from __future__ import annotations

import argparse
import asyncio

from pageferry import report
from pageferry.cli.options import given, refuse, refuse_others
from pageferry.density import hot_large_pages
from pageferry.events import Event
from pageferry.host.proc import available
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.sharing import api, policy
from pageferry.sharing.events import Undone
from pageferry.sharing.options import Options


async def run(args: argparse.Namespace) -> int:
    """Estimate how much memory merging would free. With `--apply`, merge; with `--undo`, undo the merging."""
    if args.undo:
        refuse_others(args, ("names", "undo"), "with --undo")
    if not args.apply:
        refuse(args, ("max_large_pages", "break_hot", "merge_with_others"), "without --apply")
    if not args.watch:
        refuse(args, ("interval",), "without --watch")
    with open_reporter(args.output, lambda: report.SharingView()) as out:
        if args.undo:
            out.final(Undone(args.names, await api.undo_async(args.names)))
        elif args.watch:
            await _watch(args, out)
        else:
            out.final(await _once(args, args.budget, out))
    return 0


async def _watch(args: argparse.Namespace, out: Reporter) -> None:
    """Scan at intervals and emit each result until cancelled."""
    pace = policy.Pace()
    while True:
        budget = args.budget or pace.budget(available())
        out.event(await _once(args, budget, out))
        await asyncio.sleep(args.interval)


async def _once(args: argparse.Namespace, budget: float | None, out: Reporter) -> Event:
    options = Options(**{**given(args, Options), "budget": budget})
    if args.apply:
        chosen = {name: getattr(args, name) for name in ("threshold", "max_large_pages", "merge_with_others")}
        hot = set() if args.break_hot else await hot_large_pages(args.names)
        return await api.share_async(args.names, options, **chosen, hot=hot, listener=out.event)
    return await api.find_async(args.names, options, threshold=args.threshold, listener=out.event)
