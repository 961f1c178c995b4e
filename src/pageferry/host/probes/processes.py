"""Probes of access to the memory of another process of the same user.

The other process is not a descendant of the probing process, just as a QEMU started by another program is not. Yama
(kernel.yama.ptrace_scope) can restrict access to such processes.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

from pageferry import _engine
from pageferry.host.probes import kernel
from pageferry.host.probes.child import run_all
from pageferry.host.probes.kernel import LARGE_PAGE, SMALL_PAGE, expect
from pageferry.host.probes.probe import AS_ROOT, Probe, newer_kernel

YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")

_TIMEOUT = 4.0


class Neighbour:
    """Process that writes, on request, to pages of memory that it shares with this process at the same address."""

    def __init__(self) -> None:
        self.memory = kernel.shared_memory()
        orders, self._orders = os.pipe()
        self._done, done = os.pipe()
        self.parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._orders)  # otherwise the child would never see the end of the pipe
            self._work(orders, done)

    def _work(self, orders: int, done: int) -> None:
        view = memoryview(self.memory)
        try:
            while page := os.read(orders, 1):
                view[page[0] * SMALL_PAGE] = page[0]
                os.write(done, page)
        finally:
            os._exit(0)

    def end(self) -> None:
        """Kill the process and reap it. Only the parent of the process may call this method."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def write_to(self, page: int) -> None:
        """Make the process write to a page (1 to 255), and wait until it has."""
        order = bytes([page])
        os.write(self._orders, order)
        expect(os.read(self._done, 1) == order, "the other process has exited")


def _with_neighbour(attempt: Callable[[Neighbour], str]) -> Callable[[], str]:
    def run() -> str:
        neighbour = Neighbour()
        # A sibling of the neighbour makes the attempt, because the parent may have rights that other processes lack.
        (outcome,) = run_all([lambda: attempt(neighbour)], _TIMEOUT, groups=False)
        neighbour.end()
        return outcome.detail_or_raise()

    return run


def _ptrace(neighbour: Neighbour) -> str:
    said = _engine.Space(neighbour.pid).getppid()
    expect(said == neighbour.parent, f"getppid() in another process returned {said} instead of {neighbour.parent}")
    neighbour.write_to(1)
    return "a system call executed in another process"


def _pidfd_getfd(neighbour: Neighbour) -> str:
    with kernel.step("pidfd_open"):
        space = _engine.Space(neighbour.pid)
    with kernel.step("pidfd_getfd"):
        taken = space.descriptor(neighbour.memory.fileno())
    same = os.path.samestat(os.fstat(taken), os.fstat(neighbour.memory.fileno()))
    expect(same, "the copied descriptor refers to another file")
    return "a descriptor copied from another process"


def _adopt(neighbour: Neighbour) -> str:
    """Trace another process with the engine: create a userfaultfd in it, copy the descriptor, and read the trace."""
    space = _engine.Space(neighbour.pid)
    trace = _engine.Trace([_engine.MappedSegment(space, neighbour.memory.address, LARGE_PAGE)])
    before, after = _engine.PageSet(LARGE_PAGE // SMALL_PAGE), _engine.PageSet(LARGE_PAGE // SMALL_PAGE)
    trace.collect([before])
    neighbour.write_to(7)
    trace.collect([after])
    trace.remove()
    expect(
        not before and after.runs() == [(7, 8)],
        f"another process wrote to page 7; traces showed {before.runs()} before and {after.runs()} after",
    )
    return "a write of another process traced"


def _collapse_remote(neighbour: Neighbour) -> str:
    for page in (1, 2):
        neighbour.write_to(page)
    _engine.Space(neighbour.pid).collapse(neighbour.memory.address, LARGE_PAGE)
    expect(
        kernel.large_pages_mapped(neighbour.memory.address, neighbour.pid), "the call succeeded, but left base pages"
    )
    expect(memoryview(neighbour.memory)[2 * SMALL_PAGE] == 2, "the contents were lost")
    return "a huge page mapped in another process"


def _trace_remedy() -> str:
    try:
        scope = YAMA.read_text().strip()
    except OSError:
        scope = "0"
    yama = "" if scope == "0" else f", or set sysctl kernel.yama.ptrace_scope=0 (it is {scope})"
    return f"{AS_ROOT} (CAP_SYS_PTRACE){yama}; in a container, also allow ptrace in its seccomp profile"


PROBES = (
    Probe("ptrace", _with_neighbour(_ptrace), _trace_remedy()),
    Probe("pidfd-getfd", _with_neighbour(_pidfd_getfd), _trace_remedy(), {errno.ENOSYS: newer_kernel("5.6")}),
    Probe("adopt", _with_neighbour(_adopt), _trace_remedy(), {errno.EINVAL: newer_kernel("6.7", "CONFIG_USERFAULTFD")}),
    Probe(
        "madv-collapse-remote",
        _with_neighbour(_collapse_remote),
        newer_kernel("6.1", "CONFIG_TRANSPARENT_HUGEPAGE"),
        {
            errno.EPERM: f"{AS_ROOT} (CAP_SYS_NICE and the right to trace)",
            errno.ENOMEM: "make a huge page available: free memory",
            errno.EAGAIN: "make a huge page available: free memory",
        },
    ),
)
