"""`pageferry logs`: print the log of a guest that runs or has ended."""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Callable

from pageferry.cli.options import given, refuse
from pageferry.control import logs
from pageferry.control.events import GuestLog
from pageferry.control.options import LogOptions
from pageferry.host.blocking import in_thread
from pageferry.printable import printable
from pageferry.report.reporter import open_reporter


async def run(args: argparse.Namespace) -> int:
    """Print the log, follow it, or remove it."""
    options = LogOptions(**given(args, LogOptions))
    if args.remove:
        refuse(args, ("lines",), "with --remove")
        logs.forget(args.name)
    elif args.output == "json":
        await _emit(args, options)
    else:
        write = _terminal() if sys.stdout.isatty() else _write
        async for data in logs.follow(args.name, options, once=not args.follow):
            await in_thread(write, data)
    return 0


async def _emit(args: argparse.Namespace, options: LogOptions) -> None:
    with open_reporter(args.output) as reporter:
        if not args.follow:
            text = await logs.logs_async(args.name, lines=options.lines)
            reporter.final(GuestLog(workload=args.name, text=text))
            return
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        async for data in logs.follow(args.name, options):
            if text := decoder.decode(data):
                reporter.event(GuestLog(workload=args.name, text=text))


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _terminal() -> Callable[[bytes], None]:
    """Return a function that writes to a terminal, with escapes for characters that the terminal would interpret."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(data: bytes) -> None:
        sys.stdout.write(printable(decoder.decode(data).replace("\r\n", "\n")))
        sys.stdout.flush()

    return write
