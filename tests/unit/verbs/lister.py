"""Synchronous verb that emits events and a result, or fails on request."""

import argparse
import logging
import os
import time

from pageferry import errors
from pageferry.events import Event
from pageferry.report.reporter import open_reporter

WORKS_ON = "words"


class Step(Event, frozen=True, tag="step"):
    """Event for each step."""

    number: int


class Total(Event, frozen=True, tag="total"):
    """Result of the verb: number of steps."""

    steps: int


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--fail", help="raise this class of pageferry.errors, or RuntimeError if there is none")
    parser.add_argument("--sleep", action="store_true", help="print `asleep`, then sleep for 60 s")
    parser.add_argument("--linger", action="store_true", help="print `asleep` after the steps, then sleep for 60 s")
    parser.add_argument("words", nargs="*")


def run(args: argparse.Namespace) -> int:
    logging.getLogger("pageferry.verbs").info("listing %d", args.steps)
    logging.getLogger("pageferry.verbs").debug("pid %d", os.getpid())
    if args.fail:
        raise getattr(errors, args.fail, RuntimeError)("told to fail")
    if args.sleep:
        print("asleep", flush=True)
        time.sleep(60)
    with open_reporter(args.output) as reporter:
        for number in range(args.steps):
            reporter.event(Step(number))
        if args.linger:
            print("asleep", flush=True)
            time.sleep(60)
        reporter.final(Total(args.steps))
    return 7 if args.words == ["seven"] else 0
