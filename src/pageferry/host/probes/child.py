"""Probes in child processes: a probe that blocks or crashes is reported, and affects no other process.

All probes run in parallel, each in a separate fork and process group, so that processes started by a probe end with it.
A fork requires that no other thread of the process holds locks, which is true of the command.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from pageferry.host.processes import signal_name

DEADLINE = 5.0
"""Time limit for all probes together, seconds. Normally, they take a fraction of a second."""

_POLL = 0.002


class Unavailable(Exception):
    """Error of a probe: the kernel did not perform the operation."""

    def __init__(self, reason: str, *, remedy: str | None = None, error: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        """Remedy that takes precedence over the table of probes; None to use the remedies of the table."""
        self.error = error
        """Errno of the failed operation; None if there is none."""


class Outcome(msgspec.Struct, frozen=True):
    """Result of a probe in a child."""

    available: bool
    detail: str
    error: int | None = None
    remedy: str | None = None

    def detail_or_raise(self) -> str:
        """Return the detail if the feature is available. Raises Unavailable with the detail otherwise."""
        if not self.available:
            raise Unavailable(self.detail, remedy=self.remedy, error=self.error)
        return self.detail


@dataclass(frozen=True, slots=True)
class _Child:
    pid: int
    result: int
    """Read end of the pipe for the outcome, which is far smaller than the capacity of the pipe."""
    leads_group: bool

    def exited(self) -> bool:
        """Return whether the child has exited. It is not reaped, so that its pid is not reused."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        except ChildProcessError:  # SIGCHLD is ignored: the kernel has reaped the child
            return True

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if self.leads_group else os.kill)(self.pid, signal.SIGKILL)

    def outcome(self, deadline: float) -> Outcome:
        """Kill the process group of the child, reap the child, and return the outcome that it has written."""
        in_time = self.exited()
        self.kill()
        status = _reap(self.pid)
        os.set_blocking(self.result, False)
        try:
            answer = os.read(self.result, 1 << 16)
        except BlockingIOError:  # nothing was written; a process of the group has the write end open
            answer = b""
        finally:
            os.close(self.result)
        if in_time and answer:
            return msgspec.json.decode(answer, type=Outcome)
        return Outcome(False, _how_it_ended(in_time, status, deadline))


def run_all(works: Sequence[Callable[[], str]], deadline: float = DEADLINE, *, groups: bool = True) -> list[Outcome]:
    """Run functions in children, in parallel. Return results and failures in the order of `works`.

    `deadline`: limit for all of them together, seconds. Without `groups`, the children stay in the caller's process
    group. This is for children of a probe, because they end with the probe.
    """
    children: list[_Child] = []
    try:
        for work in works:
            children.append(_start(work, groups))  # noqa: PERF401  # the handler kills it if a later start fails
        end = time.monotonic() + deadline
        while time.monotonic() < end and not all(child.exited() for child in children):
            time.sleep(_POLL)
    except BaseException:
        for child in children:
            child.outcome(deadline)
        raise
    return [child.outcome(deadline) for child in children]


def outcome_of(work: Callable[[], str]) -> Outcome:
    """Run a function in this process and return its outcome. Raises nothing."""
    try:
        return Outcome(True, work())
    except Unavailable as missing:
        return Outcome(False, missing.reason, missing.error, missing.remedy)
    except OSError as refused:
        return Outcome(False, _reason(refused), _errno(refused))
    except BaseException as mistake:
        return Outcome(False, f"the probe itself failed: {type(mistake).__name__}: {mistake}")


def _start(work: Callable[[], str], groups: bool) -> _Child:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            writing = fcntl.fcntl(writing, fcntl.F_DUPFD, 3)  # `_settle` replaces 0 to 2
            _settle(groups)
            os.write(writing, msgspec.json.encode(outcome_of(work)))
        finally:
            os._exit(0)
    os.close(writing)
    if groups:
        # Parent and child both call setpgid(2), so that the group exists before the parent may have to kill it.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
    return _Child(pid, reading, groups)


def _settle(group: bool) -> None:
    """Detach a fork from its parent: signal handlers, process group if `group`, core dumps and standard streams."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if group:
        os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)


def _reap(pid: int) -> int | None:
    """Reap a killed process and return its wait status; None if the process does not exit, because it is blocked in the
    kernel."""
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        try:
            reaped, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if reaped:
            return status
        time.sleep(_POLL)
    return None


def _how_it_ended(in_time: bool, status: int | None, deadline: float) -> str:
    if not in_time:
        return f"the probe did not finish within {deadline:g} s"
    if status is not None and os.WIFSIGNALED(status):
        return f"the probe was killed by {signal_name(os.WTERMSIG(status))}"
    return "the probe exited without a result"


def _reason(error: OSError) -> str:
    number = error.errno
    if number is None:
        return str(error)
    step = f"{error.filename}: " if error.filename else ""
    text = error.strerror or os.strerror(number)
    return f"{step}{text} ({errno.errorcode.get(number, number)})"


def _errno(error: OSError) -> int | None:
    if error.errno is None and isinstance(error, PermissionError):
        return errno.EPERM
    return error.errno
