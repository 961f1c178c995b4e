"""Process of Firecracker at the other end of a socket: identity, signals and end.

The kernel provides a pidfd of the process that has connected (SO_PEERPIDFD, Linux 6.5). On an older kernel, the process
is opened by its process id (SO_PEERCRED); a process that was started after the connection has reused the id, and is
refused. All signals are sent through the pidfd, so that no other process can receive them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import socket
import time

from pageferry.errors import WorkloadDied
from pageferry.host import proc
from pageferry.host.peer_credentials import peer_credentials
from pageferry.pager.firecracker.events import Action

_SO_PEERPIDFD = 77
"""Socket option of Linux 6.5 that the module `socket` does not define."""
_UNSUPPORTED = (errno.ENOPROTOOPT, errno.EINVAL, errno.EOPNOTSUPP)
SIGNALS: dict[Action, signal.Signals] = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}
"""Signal for each action."""
_SETTLE = 5.0
"""Maximum time to wait for the exit of a killed process, seconds."""


class Peer:
    """Process that has connected. `close` closes its pidfd. The constructor raises WorkloadDied if the process has
    exited, OSError."""

    def __init__(self, connection: socket.socket) -> None:
        self.pid = peer_credentials(connection).pid
        """Process id in the PID namespace of this process."""
        if not self.pid:
            raise WorkloadDied(
                "cannot identify the process that has connected: it is not visible in the PID namespace of the pager; "
                "run the pager in the namespace of the host"
            )
        self._pidfd = _pidfd(connection, self.pid)
        self._ended: asyncio.Event | None = None

    @property
    def descriptor(self) -> int:
        """Pidfd of the process."""
        return self._pidfd

    def exited(self) -> bool:
        """Return whether the process has exited."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    async def wait_for_end(self) -> None:
        """Wait until the process has exited. Several tasks may wait."""
        if self._ended is None:
            self._ended = asyncio.Event()
            # Once for all tasks: an event loop has only one callback per descriptor.
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)
        await self._ended.wait()

    def _on_end(self) -> None:
        assert self._ended is not None
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._ended.set()

    async def stop(self, action: Action) -> str | None:
        """Kill or stop the process, and wait until it has exited if it is killed. Return the cause if that failed."""
        if action == "none":
            return None
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, SIGNALS[action])
        except OSError as error:
            return f"cannot {action} process {self.pid}: {error.strerror}; run the pager as root or as its user"
        if action == "kill":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait_for_end(), _SETTLE)
        return None

    def close(self) -> None:
        """Close the pidfd, in the thread of the event loop. May be called twice."""
        descriptor, self._pidfd = self._pidfd, -1
        if descriptor >= 0:
            if self._ended is not None:
                asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)


def _pidfd(connection: socket.socket, pid: int) -> int:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise WorkloadDied(f"process {pid} exited after it had connected") from error
    return _pidfd_of(pid)


def _pidfd_of(pid: int) -> int:
    """Return a pidfd of a process that has connected before this call. Raises WorkloadDied."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise WorkloadDied(f"process {pid} exited after it had connected") from error
    started = proc.start_time(pid)
    if started is None or started > now:
        os.close(descriptor)
        raise WorkloadDied(f"process {pid} exited after it had connected; another process has its id")
    return descriptor
