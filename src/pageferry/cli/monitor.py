"""`pageferry monitor`: execute commands of QEMU's monitor, from arguments, a script or a terminal."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

from pageferry.control.events import MonitorReply
from pageferry.control.monitor import monitor_async, parse_qmp, qmp_async
from pageferry.errors import NoSuchWorkload, PageferryError, WorkloadDied
from pageferry.printable import message, printable
from pageferry.report.reporter import open_reporter


def run(args: argparse.Namespace) -> int:
    """Execute the command of the arguments, or all lines of standard input. Raises the first error, except on a
    terminal, where errors are printed."""
    words = [*args.words, *args.command]
    if words:
        _execute(args, " ".join(words))
    elif sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        _converse(args)
    else:
        for line in sys.stdin or ():
            if line.strip():
                _execute(args, line.strip())
    return 0


def _converse(args: argparse.Namespace) -> None:
    """Execute the lines of a terminal, until the end of its input or of the guest."""
    kind = "QMP" if args.qmp else "HMP"
    print(f"{kind} monitor of {args.name}; Ctrl-D leaves it, `quit` ends the guest", file=sys.stderr)  # noqa: T201
    for line in _lines(f"({args.name}) "):
        try:
            _execute(args, line)
        except (WorkloadDied, NoSuchWorkload):
            raise
        except PageferryError as error:
            print(f"error: {message(str(error))}", file=sys.stderr)  # noqa: T201


def _lines(prompt: str) -> Iterator[str]:
    """Yield the lines that are not empty, with line editing and a history."""
    import readline  # noqa: F401  # `input` uses the module if it is imported

    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print()  # noqa: T201  # the shell's prompt begins in a new line
            return
        if line:
            yield line


def _execute(args: argparse.Namespace, line: str) -> None:
    """Execute one command, and print its result."""
    output, result = None, None
    if args.qmp:
        command, arguments = parse_qmp(line)
        result = asyncio.run(qmp_async(args.name, command, arguments))
    else:
        command = line.split()[0]
        output = asyncio.run(monitor_async(args.name, line)).replace("\r\n", "\n")
    if args.output == "json":
        with open_reporter(args.output) as reporter:
            reporter.event(MonitorReply(workload=args.name, command=command, output=output, result=result))
    else:
        _print(output if output is not None else _json(result))


def _print(text: str) -> None:
    """Print the result of a command, with escapes for characters that a terminal would interpret."""
    if text:
        sys.stdout.write(printable(text.removesuffix("\n")) + "\n")
        sys.stdout.flush()


def _json(result: Any) -> str:
    """Return a result as JSON: formatted for a terminal, otherwise in one line."""
    return json.dumps(result, indent=2 if sys.stdout.isatty() else None)
