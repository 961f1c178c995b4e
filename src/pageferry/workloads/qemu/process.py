"""A QEMU process that we start: its output, its end, and what it said before it ended."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pageferry.errors import UsageError, WorkloadError
from pageferry.host import files, proc, processes
from pageferry.host.qmp import Monitor

_STARTUP_TIMEOUT = 120.0
"""Seconds until the monitor answers. Preallocated memory takes its time."""

_LOG_TAIL = 2000
"""Bytes of the log that an error message quotes."""


class QemuProcess:
    """A process that we have started."""

    def __init__(self, popen: subprocess.Popen[bytes], program: str, log: Path | None) -> None:
        self._popen = popen
        self._program = program
        self._log = log

    @property
    def pid(self) -> int:
        """Of what we have started, which may be a wrapper around QEMU."""
        return self._popen.pid

    def poll(self) -> int | None:
        """Its exit code (-N: signal N), or None while it runs."""
        return self._popen.poll()

    async def wait(self) -> int:
        """Wait for its end and return its exit code (-N: signal N)."""
        started = proc.start_time(self.pid)
        if started is not None:
            await processes.wait_for_end(self.pid, started)
        return self._popen.wait()  # it has ended, there is nothing to wait for

    async def monitor(self, socket_path: str) -> Monitor:
        """A session with its monitor, as soon as it has one.

        Raises WorkloadError, with what QEMU said, when it ends instead.
        """
        deadline = asyncio.get_running_loop().time() + _STARTUP_TIMEOUT
        while True:
            if (code := self.poll()) is not None:
                raise WorkloadError(f"{self._program} ended at once with exit code {code}{self.last_words()}")
            try:
                return await Monitor.open(socket_path)
            except WorkloadError as failed:
                if asyncio.get_running_loop().time() > deadline:
                    raise WorkloadError(f"{self._program} opened no monitor: {failed}{self.last_words()}") from failed
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            self._popen.kill()
            self._popen.wait()

    def last_words(self) -> str:
        """The end of its log, to be put after a message; what it said on a terminal needs no repeating."""
        if self._log is None:
            return ""
        return f"; its output:\n{tail}" if (tail := log_tail(self._log)) else " without output"


def launch(command: Sequence[str], inherited: Sequence[int], log: Path | None) -> QemuProcess:
    """Start QEMU: on our terminal, or, with a `log`, in a session of its own that outlives ours.

    `inherited`: descriptors that it is to have too, under the same numbers. Raises UsageError where the program is not
    found or may not be run.
    """
    output: IO[bytes] | None = None
    try:
        if log is not None:
            output = open(files.open_private(log, os.O_WRONLY | os.O_APPEND), "ab")  # noqa: SIM115  # closed below
        popen = processes.Outliving[bytes](
            command,
            stdin=None if log is None else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=inherited,
            start_new_session=log is not None,
        )
    except (FileNotFoundError, PermissionError) as failed:
        raise UsageError(f"cannot run {command[0]}: {failed.strerror}") from failed
    finally:
        if output is not None:
            output.close()
    return QemuProcess(popen, command[0], log)


def log_tail(log: Path) -> str:
    """The last lines of a log, or an empty string where there is none."""
    try:
        return log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
