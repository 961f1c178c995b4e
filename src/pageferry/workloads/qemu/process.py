"""QEMU process that pageferry has started: its start, output and exit."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pageferry.errors import UsageError, WorkloadError
from pageferry.host import files, proc, processes
from pageferry.host.qmp import Monitor

_STARTUP_TIMEOUT = 120.0
"""Maximum time until the monitor replies, seconds. Preallocation of memory can take a long time."""

_LOG_TAIL = 2000
"""Number of bytes of the log that an error message quotes."""


class QemuProcess:
    """QEMU process that was started by pageferry."""

    def __init__(self, popen: subprocess.Popen[bytes], program: str, log: Path | None) -> None:
        self._popen = popen
        self._program = program
        self._log = log

    @property
    def pid(self) -> int:
        """Process id of the started program, which may be a wrapper around QEMU."""
        return self._popen.pid

    def poll(self) -> int | None:
        """Return the exit code (-N: signal N), or None while the process runs."""
        return self._popen.poll()

    async def wait(self) -> int:
        """Wait until the process has exited, and return its exit code (-N: signal N)."""
        started = proc.start_time(self.pid)
        if started is not None:
            await processes.wait_for_end(self.pid, started)
        return self._popen.wait()  # the process has exited: this does not block

    async def monitor(self, socket_path: str) -> Monitor:
        """Wait until QEMU serves its monitor, and open a session.

        Raises WorkloadError, with QEMU's message, if the process exits first, or if the monitor does not reply within
        `_STARTUP_TIMEOUT` seconds.
        """
        deadline = asyncio.get_running_loop().time() + _STARTUP_TIMEOUT
        while True:
            if (code := self.poll()) is not None:
                raise WorkloadError(f"cannot start {self._program}: it exited with exit code {code}{self.last_words()}")
            try:
                return await Monitor.open(socket_path)
            except WorkloadError as failed:
                if asyncio.get_running_loop().time() > deadline:
                    raise WorkloadError(f"cannot start {self._program}: {failed}{self.last_words()}") from failed
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        """Kill the process at once."""
        if self.poll() is None:
            self._popen.kill()
            self._popen.wait()

    def last_words(self) -> str:
        """Return the end of the log, to be appended to an error message; an empty string if the output is on a
        terminal."""
        if self._log is None:
            return ""
        return f"; its output:\n{tail}" if (tail := log_tail(self._log)) else " without output"


def launch(command: Sequence[str], inherited: Sequence[int], log: Path | None) -> QemuProcess:
    """Start QEMU on the terminal of this process or, with a `log`, in a separate session that outlives this process.

    `inherited`: descriptors that QEMU inherits, under the same numbers. Raises UsageError if the program does not exist
    or cannot be executed.
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


def is_binary(program: str) -> bool:
    """Return whether a program, found in PATH, is an ELF binary and not a script."""
    path = shutil.which(program)
    if path is None:
        return False
    try:
        with open(files.open_regular(path), "rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def quoted(log: Path) -> str:
    """Return the last lines of a log, to be appended to an error message; an empty string if there is none."""
    return f"; QEMU says:\n{said}" if (said := log_tail(log)) else ""


def log_tail(log: Path) -> str:
    """Return the last lines of a log; an empty string if there is none."""
    try:
        return log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
