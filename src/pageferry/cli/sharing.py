"""`pageferry sharing`: how much memory equal pages take, inside large pages too, and sharing them where it pays."""

from __future__ import annotations

import argparse
import asyncio

from pageferry.cli.activity import hot_large_pages
from pageferry.cli.arguments import fraction, integer, seconds, size
from pageferry.errors import UsageError
from pageferry.events import Event
from pageferry.host.meminfo import available
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.report.sharing import SharingView
from pageferry.sharing import api, policy
from pageferry.sharing.scan import Options

WORKS_ON = "names"
DEFAULTS = Options()


class Undone(Event, frozen=True, tag="sharing-undone"):
    """What `--undo` did."""

    workloads: list[str]
    bytes: int
    """Of memory whose sharing has been taken back."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = (
        "Looks for small pages whose content stands elsewhere too: pages of zeros, of one pattern, and equal pages, "
        "within a workload and between those named. Says what sharing them would free, and how many large pages must "
        "be broken for how much of it. With --apply, breaks those that are worth it, and shares: private memory by "
        "KSM, on the chosen large pages alone; of the files of guests and arenas, zeros are given back. Workloads "
        "share with each other only if they are named together: see the note on side channels in docs/systems/s9.md."
    )
    parser.add_argument("names", metavar="NAME|pid:N", nargs="+", help="workloads (see `pageferry list`) or processes")
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--apply", action="store_true", help="share; without it nothing is changed")
    doing.add_argument("--undo", action="store_true", help="take sharing back, and allow large pages again")
    choosing = parser.add_argument_group("choosing")
    choosing.add_argument(
        "--threshold",
        type=integer,
        metavar="N",
        help="break large pages of which at least N of the 512 pages can be shared (default: 256 when half of the "
        "memory of this host is free, down to 16)",
    )
    choosing.add_argument("--most", type=integer, metavar="N", help="break at most N large pages, the best ones")
    choosing.add_argument(
        "--break-hot",
        action="store_true",
        help="break large pages that are in use, too; without this --apply looks first which are (as `pageferry "
        "large-pages` does), and leaves those whole",
    )
    choosing.add_argument(
        "--beside-others",
        action="store_true",
        help="though other processes have offered memory to KSM (QEMU does, without mem-merge=off), which is then "
        "merged with that of these",
    )
    looking = parser.add_argument_group("looking")
    looking.add_argument("--budget", type=fraction, metavar="P%", help="part of one CPU to use (default: all there is)")
    looking.add_argument("--memory", type=size, default=DEFAULTS.memory, metavar="SIZE", help="of its own (256M)")
    looking.add_argument("--every", type=integer, default=1, metavar="N", help="look at every Nth large page only")
    looking.add_argument("--threads", type=integer, default=0, metavar="N", help="(one for each CPU)")
    looking.add_argument("--watch", action="store_true", help="again and again, slowly; faster when memory is scarce")
    looking.add_argument(
        "--interval",
        type=seconds,
        default=60.0,
        metavar="DURATION",
        help="time between looks, such as 30s or 1m; a number alone counts seconds (1m)",
    )


async def run(args: argparse.Namespace) -> int:
    """Estimate, share or undo."""
    if args.undo and args.watch:
        raise UsageError("--undo is done once: leave --watch out")
    with open_reporter(args.output, SharingView()) as out:
        if args.undo:
            out.final(Undone(args.names, await api.undo(args.names)))
        elif args.watch:
            await _watch(args, out)
        else:
            out.final(await _once(args, args.budget, out))
    return 0


async def _watch(args: argparse.Namespace, out: Reporter) -> None:
    """A result for every look, until somebody ends it."""
    pace = policy.Pace()
    while True:
        budget = args.budget or pace.budget(available())
        out.event(await _once(args, budget, out))
        await asyncio.sleep(args.interval)


async def _once(args: argparse.Namespace, budget: float | None, out: Reporter) -> Event:
    options = Options(memory=args.memory, every=args.every, threads=args.threads, budget=budget)
    if args.apply:
        chosen = {name: getattr(args, name) for name in ("threshold", "most", "beside_others")}
        hot = set() if args.break_hot else await hot_large_pages(args.names)
        return await api.share(args.names, options, **chosen, hot=hot, listener=out.event)
    return await api.find(args.names, options, threshold=args.threshold, listener=out.event)
