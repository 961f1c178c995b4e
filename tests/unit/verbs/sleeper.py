"""Asynchronous verb that sleeps until it is cancelled, then ends as requested (`--then`)."""

import argparse
import asyncio
import sys

from pageferry.errors import Cancelled


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--then", choices=("let-go", "raise", "finish", "refuse"), default="let-go")


async def run(args: argparse.Namespace) -> int:
    print("asleep", flush=True)
    try:
        await asyncio.sleep(args.seconds)
    except asyncio.CancelledError:
        print("cleaned up", flush=True)
        if args.then == "raise":
            raise Cancelled("cancelled; the workload runs on") from None
        if args.then == "finish":
            return 5
        if args.then == "refuse":
            await asyncio.sleep(args.seconds)
        raise
    finally:
        sys.stdout.flush()
    return 4
