"""Execution of a verb: logging, signals, sinks of events, and conversion of errors to a message and an exit code."""

from __future__ import annotations

import argparse
import asyncio
import select
import signal
import sys
import traceback
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pageferry.cli.logging_setup import configure_logging, with_options
from pageferry.cli.signals import Interruption
from pageferry.cli.sinks import open_sinks
from pageferry.errors import Cancelled, PageferryError
from pageferry.printable import message, printable

if TYPE_CHECKING:
    from pageferry.report.event_log import EventLog


def execute(args: argparse.Namespace) -> int:
    """Run the verb of a parsed command line, and return its exit code. Raises BrokenPipeError if the reader has closed
    stdout."""
    configure_logging(args.debug, vars(args))
    with Interruption() as interruption, ExitStack() as stack:
        log: EventLog | None = None
        try:
            log = open_sinks(args, stack)
            code, ended_by = _run_verb(args, interruption), None
        except BaseException as error:
            code, ended_by = _end_of(error, args, interruption.received), error
        if log is not None:
            log.end(code, ended_by)
        return code


def _run_verb(args: argparse.Namespace, interruption: Interruption) -> int:
    outcome = args.run(args)
    return outcome if isinstance(outcome, int) else interruption.run(outcome)


def _end_of(error: BaseException, args: argparse.Namespace, received: signal.Signals | None) -> int:
    """Print the error that ended a verb to stderr, and return the exit code. Raises BrokenPipeError if the reader
    has closed stdout."""
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        raise error
    if args.debug:
        sys.stderr.write(printable("".join(traceback.format_exception(error))))
    if received is not None and isinstance(error, (KeyboardInterrupt, asyncio.CancelledError, Cancelled)):
        _print_error(str(error) or "interrupted")
        return 128 + received
    if isinstance(error, PageferryError):
        _print_error(f"error: {with_options(str(error), vars(args))}")
        return error.exit_code
    hint = "" if args.debug else " (unexpected; --debug shows the traceback)"
    _print_error(f"error: {type(error).__name__}: {error}{hint}")
    return 1


def _print_error(text: str) -> None:
    print(f"pageferry: {message(text)}", file=sys.stderr)  # noqa: T201


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(state & select.POLLERR for _, state in poll.poll(0))
