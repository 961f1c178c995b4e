"""Process that serves a QMP socket, identified by the credentials of the socket.

The monitor's own statements are not trusted. Any process can serve QMP on a socket and report threads of another
process as its vCPUs; a command run by root would then open the memory of that other process and kill it. The kernel
records the process and the user that called listen(2) (SO_PEERCRED, SO_PEERPIDFD). The guest's process must be that
process, or a descendant to which it has passed the socket, as launchers do. The guest's process must run as the user
that called listen(2). If that user is root, the guest's process may run as any user, because QEMU can drop its
privileges (`-runas`). The vCPU threads that QEMU reports must be threads of the guest's process. Their ids are compared
in the PID namespace of the guest's process, because QEMU reports them in that namespace.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from pageferry.errors import UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.host.peer_credentials import peer_credentials
from pageferry.host.processes import descendants

_SO_PEERPIDFD = 77
"""Socket option of Linux 6.5 (include/uapi/asm-generic/socket.h)."""
_CAP_SYS_PTRACE = 1 << 19


@dataclass(frozen=True, slots=True)
class Peer:
    """Listener of a Unix socket."""

    pid: int | None
    """Pid in the PID namespace of this process; 0 if the listener is not visible there, None if it has exited."""
    uid: int
    """User id of the listener when it called listen(2)."""


def peer_of(connection: socket.socket) -> Peer:
    """Return the listener of a connected Unix socket."""
    pid, uid, _ = peer_credentials(connection)
    try:
        descriptor = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as refused:
        # A kernel without SO_PEERPIDFD: the pid may have been reused. Other errors: the listener has exited.
        return Peer(pid if refused.errno == errno.ENOPROTOOPT else None, uid)
    try:
        return Peer(_pid_of(descriptor), uid)
    finally:
        os.close(descriptor)


def find_process(peer: Peer, vcpu_threads: Sequence[int], path: str) -> int:
    """Return the pid of the process that serves the QMP socket at `path` and whose monitor reports these vCPU threads.

    Raises UnsupportedError if the process is outside of the PID namespace of this process. Raises WorkloadError if the
    listener has exited, if not exactly one process matches, or if this user has no rights over the process.
    """
    if peer.pid == 0:
        raise UnsupportedError(
            f"cannot identify the process that serves {path}: it is outside this PID namespace; run pageferry in "
            "the namespace of that QEMU, or in one above it"
        )
    _check_caller(peer, path)
    if peer.pid is None or proc.start_time(peer.pid) is None:
        raise WorkloadError(
            f"cannot trust {path}: the process that created it has exited; use a socket created with QEMU's -qmp option"
        )
    found = [pid for pid in (peer.pid, *descendants(peer.pid)) if _matches(pid, peer, vcpu_threads)]
    match found:
        case [only]:
            return only
        case []:
            raise WorkloadError(
                f"cannot trust {path}: its monitor reports vCPU threads that belong neither to process "
                f"{peer.pid}, which serves it as user {peer.uid}, nor to a descendant of that process with the same "
                "user; use the QMP socket of a QEMU"
            )
        case _:
            names = ", ".join(map(str, found))
            raise WorkloadError(
                f"cannot determine which of the processes {names} serves {path}; use a socket that QEMU itself "
                "has created"
            )


def _matches(pid: int, peer: Peer, vcpu_threads: Sequence[int]) -> bool:
    """Return whether a process has all of these threads, and runs as the listening user."""
    with contextlib.suppress(WorkloadDied):
        if peer.uid != 0 and proc.users(pid) != {peer.uid}:
            return False
        return bool(vcpu_threads) and proc.inner_threads(pid).keys() >= set(vcpu_threads)
    return False


def _check_caller(peer: Peer, path: str) -> None:
    """Raise WorkloadError if this process has no rights over processes of the listening user, UnsupportedError if /proc
    is that of another PID namespace."""
    if proc.namespace() is None:
        raise UnsupportedError(
            "cannot use /proc: it belongs to another PID namespace; mount proc(5) in the namespace of pageferry"
        )
    capabilities = int(proc.status(os.getpid())[b"CapEff"][0], 16)
    if os.geteuid() not in (0, peer.uid) and not capabilities & _CAP_SYS_PTRACE:
        raise WorkloadError(
            f"cannot use {path}: the process that serves it belongs to user {peer.uid}; run pageferry as that "
            "user, or as root"
        )


def _pid_of(pidfd: int) -> int | None:
    """Return the pid behind a pidfd (`Pid` in /proc/PID/fdinfo/N); None if the process has exited."""
    for line in proc.lines(proc.read(os.getpid(), f"fdinfo/{pidfd}")):
        if line.startswith(b"Pid:"):
            return pid if (pid := int(line.split()[1])) >= 0 else None
    return None
