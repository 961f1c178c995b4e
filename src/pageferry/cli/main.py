"""Entry point of the command `pageferry`: parses the arguments, runs the verb, and returns the exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from pageferry._engine import end_on_truncation
from pageferry.cli.parser import parse
from pageferry.errors import WorkloadError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process). Return its exit code (docs/exit-codes.md)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # this process runs nothing but the command
        end_on_truncation(WorkloadError.exit_code)
    try:
        code = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`). Discard the buffered output: flushing it at exit would fail again.
        _discard_stdout()
        return 128 + signal.SIGPIPE
    return code


def _run(words: list[str]) -> int:
    try:
        args = parse(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    from pageferry.cli.execution import execute  # imports asyncio, which --help does not need

    return execute(args)


def _discard_stdout() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
