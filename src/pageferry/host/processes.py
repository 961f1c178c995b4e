"""Child processes that outlive this one, signals, and waiting for processes by pid and start time (see `proc`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, AnyStr

from pageferry.host import proc

_left: list[Outliving[Any]] = []
"""Children that were running when their objects were deleted."""


class Outliving(subprocess.Popen[AnyStr]):
    """Child that may outlive this process: no ResourceWarning is issued if the child was not waited for. If it exits
    first, it is reaped when the next such child is started."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        for one in list(_left):
            if one.poll() is not None:
                _left.remove(one)
        super().__init__(*arguments, **options)

    def __del__(self) -> None:
        """Keep a child that is running, to reap it later; Popen would issue a ResourceWarning."""
        if getattr(self, "pid", None) is not None and self.returncode is None:
            _left.append(self)


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGKILL, or `signal N` for a signal without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


async def wait_for_end(pid: int, started: int) -> None:
    """Wait until the process `pid` that started at `started` (see `proc.start_time`) has exited.

    The process need not be a child of this process.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    with _opened(pid, started) as descriptor:
        if descriptor is None:
            return
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)


def send_signal(pid: int, started: int, number: signal.Signals) -> None:
    """Send a signal to the process `pid` that started at `started`. Do nothing if it has exited."""
    with _opened(pid, started) as descriptor, contextlib.suppress(ProcessLookupError):
        if descriptor is not None:
            signal.pidfd_send_signal(descriptor, number)


@contextlib.contextmanager
def _opened(pid: int, started: int) -> Iterator[int | None]:
    """Yield a pidfd of the process `pid` that started at `started`, or None if it has exited."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor if proc.is_alive(pid, started) else None
    finally:
        os.close(descriptor)


def descendants(pid: int) -> list[int]:
    """Return the pids of the running descendants of a process (proc(5), /proc/PID/stat field 4)."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for child in proc.pids():
        if (parent := proc.parent(child)) is not None:
            children[parent].append(child)
    found = [pid]
    for ancestor in found:
        found.extend(children[ancestor])
    return found[1:]
