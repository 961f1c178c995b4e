"""Entry point of the command `pageferry`: parse, run the verb, end in the right exit code."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pageferry._engine import end_on_truncation
from pageferry.cli.logs import configure_logging
from pageferry.cli.parser import parse
from pageferry.cli.signals import Interruption
from pageferry.cli.telling import open_sinks
from pageferry.errors import Cancelled, PageferryError, WorkloadError
from pageferry.printable import message, printable

if TYPE_CHECKING:
    from pageferry.report.event_log import EventLog


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit code; see docs/exit-codes.md."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # a process of our own
        end_on_truncation(WorkloadError.exit_code)
    try:
        code = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has enough (`| head`). What is still buffered must not complain at exit either.
        _discard_stdout()
        return 128 + signal.SIGPIPE
    return code


def _run(words: list[str]) -> int:
    try:
        args = parse(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    configure_logging(args.debug)
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
    """Say on stderr how a verb ended and return its exit code. Lets an error pass that is about our own stdout."""
    if isinstance(error, BrokenPipeError) and _reader_has_gone():
        raise error
    if args.debug:
        sys.stderr.write(printable("".join(traceback.format_exception(error))))
    if received is not None and isinstance(error, (KeyboardInterrupt, asyncio.CancelledError, Cancelled)):
        _complain(str(error) or "interrupted")
        return 128 + received
    if isinstance(error, PageferryError):
        _complain(f"error: {_with_options(str(error), args)}")
        return error.exit_code
    hint = "" if args.debug else " (unexpected; --debug shows where it comes from)"
    _complain(f"error: {type(error).__name__}: {error}{hint}")
    return 1


def _with_options(text: str, args: argparse.Namespace) -> str:
    """The text with `max_downtime` as --max-downtime: Python has parameters where the command line has options."""
    return re.sub(r"`([a-z_]+)`", lambda name: _option(name[1]) if name[1] in vars(args) else name[0], text)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _complain(text: str) -> None:
    print(f"pageferry: {message(text)}", file=sys.stderr)  # noqa: T201


def _reader_has_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(state & select.POLLERR for _, state in poll.poll(0))


def _discard_stdout() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
