"""`pageferry console`: connect the terminal to the serial console of a guest."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from logging import getLogger
from types import FrameType

from pageferry.control.console import Console, console_async
from pageferry.errors import UsageError, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.host.files import write_all

ESCAPE = b"\x1d"
"""Byte of Ctrl-], which detaches. It is the escape character of telnet(1) and of `virsh console`."""

STDIN = 0
"""Descriptor of standard input."""

_CHUNK = 1 << 16
_PENDING = 16
"""Maximum number of chunks of piped input that the guest has not read."""
_DRAIN_TIMEOUT = 1.0
"""Maximum time after the escape key in which earlier keys are still sent to the guest, seconds."""
_FATAL = (signal.SIGHUP, signal.SIGQUIT)
"""Signals that end this process, in addition to those of `cli.signals`."""

log = getLogger(__name__)


async def run(args: argparse.Namespace) -> int:
    """Copy between the terminal and the console, until the escape key or the end of the guest."""
    if args.output == "json":
        raise UsageError("cannot print a console as JSON: remove --output json")
    with await console_async(args.name, chardev=args.chardev) as console:
        if sys.stdin is None or not sys.stdin.isatty():
            await _copy_pipe(console)
            return 0
        log.info("attached to %s; Ctrl-] detaches", args.name)
        with _raw(STDIN):
            detached = await _copy_terminal(console)
    sys.stderr.write("\n")  # the guest may have left the cursor within a line
    log.info("%s: %s", args.name, "detached" if detached else "the guest has closed its console")
    return 0


async def _copy_pipe(console: Console) -> None:
    """Copy in both directions until the guest has closed the console. Standard input may end earlier."""
    pending: asyncio.Queue[bytes] = asyncio.Queue(_PENDING)
    copying = [asyncio.ensure_future(_read_pipe(pending)), asyncio.ensure_future(_write_input(console, pending))]
    try:
        await _copy_output(console)
    finally:
        for task in copying:
            task.cancel()


async def _copy_terminal(console: Console) -> bool:
    """Copy in both directions. Return True if the user has detached, False if the guest has closed the console."""
    # A guest may not read its input. The escape key must be read in any case, so this queue is not bounded.
    pending: asyncio.Queue[bytes] = asyncio.Queue()
    output = asyncio.ensure_future(_copy_output(console))
    keys = asyncio.ensure_future(_read_keys(pending))
    writing = asyncio.ensure_future(_write_input(console, pending))
    try:
        done, _ = await asyncio.wait({output, keys}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_TIMEOUT if output not in done else 0):
                await pending.join()
        return output not in done
    finally:
        for copying in (output, keys, writing):
            copying.cancel()


async def _copy_output(console: Console) -> None:
    while data := await in_thread(console.read):
        await in_thread(write_all, sys.stdout.fileno(), data)


async def _read_keys(pending: asyncio.Queue[bytes]) -> None:
    """Read keys until the escape key, or until the terminal is closed."""
    escape = b""
    while not escape and (data := await in_thread(os.read, STDIN, _CHUNK)):
        keys, escape, _ = data.partition(ESCAPE)
        if keys:
            pending.put_nowait(keys)


async def _read_pipe(pending: asyncio.Queue[bytes]) -> None:
    with contextlib.suppress(OSError):  # standard input is closed
        while data := await in_thread(os.read, STDIN, _CHUNK):
            await pending.put(data)


async def _write_input(console: Console, pending: asyncio.Queue[bytes]) -> None:
    with contextlib.suppress(WorkloadError):  # QEMU has closed the console: `_copy_output` ends as well
        while True:
            await in_thread(console.write, await pending.get())
            pending.task_done()


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """Set a terminal to raw mode during the block: every key, such as Ctrl-C, is input of the guest. The settings are
    restored at the end of the block, and before a signal of `_FATAL` ends this process."""
    saved = termios.tcgetattr(terminal)

    def end(number: int, _frame: FrameType | None) -> None:
        termios.tcsetattr(terminal, termios.TCSANOW, saved)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    previous = {number: signal.signal(number, end) for number in _FATAL}
    try:
        tty.setraw(terminal, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, saved)
        for number, handler in previous.items():
            signal.signal(number, handler)
