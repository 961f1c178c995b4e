"""Fault points: named points at which a process can be made to fail, for tests.

They are disabled unless the environment variable PAGEFERRY_FAULT is `POINT=ACTION`, such as `source.paused=kill`.
Action `kill` sends SIGKILL to this process, `stop` sends SIGSTOP, and `drop` shuts down every TCP connection of this
process, as if the link were lost. Each action is run once. docs/protocol.md lists the fault points of a migration.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat

VARIABLE = "PAGEFERRY_FAULT"

_planned: list[tuple[str, str]] = [
    (point, action) for point, separator, action in [os.environ.get(VARIABLE, "").partition("=")] if separator
]


def fault_point(name: str) -> None:
    """Run the action of this fault point if PAGEFERRY_FAULT names it. Raises ValueError if the action is unknown."""
    if not _planned or _planned[0][0] != name:
        return
    match _planned.pop()[1]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "drop":
            _cut_connections()
        case other:
            raise ValueError(f"invalid {VARIABLE} {name}={other}: expected the action kill, stop or drop")


def _cut_connections() -> None:
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed by another thread
            if stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                _cut(int(entry))


def _cut(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if connection.family in (socket.AF_INET, socket.AF_INET6) and not listens:
            connection.shutdown(socket.SHUT_RDWR)
