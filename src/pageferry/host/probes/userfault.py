"""Probes of userfaultfd: each probe registers its own memory, accesses it, and checks the result of the access."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

from pageferry import _engine
from pageferry.host.probes import kernel
from pageferry.host.probes.child import Unavailable
from pageferry.host.probes.kernel import LARGE_PAGE, SMALL_PAGE, Anonymous, Fault, Userfault, expect, shared_memory
from pageferry.host.probes.probe import Probe, newer_kernel, unknown_to_kernel

_PATTERN = bytes(range(256)) * (SMALL_PAGE // 256)
_PRIVILEGE = (
    "run as root (CAP_SYS_PTRACE), set sysctl vm.unprivileged_userfaultfd=1, or give this user access to "
    f"{kernel.DEVICE} (chgrp and chmod g+rw, by a udev rule); in a container, pass {kernel.DEVICE} through, or allow "
    "userfaultfd in its seccomp profile"
)


def _userfaultfd() -> str:
    uffd = Userfault()
    lacking = [name for bit, name in enumerate(kernel.FEATURES) if not uffd.offered >> bit & 1]
    faults = "faults of user mode only" if uffd.user_mode_only else "faults of user mode and of the kernel"
    features = f"without {', '.join(lacking)}" if lacking else f"all {len(kernel.FEATURES)} features"
    return f"{faults}{_by(uffd)}; {features}"


def _by(uffd: Userfault) -> str:
    return f", by {kernel.DEVICE}" if uffd.by_device else ""


def _kernel_faults() -> str:
    memory = Anonymous(LARGE_PAGE)
    uffd = Userfault(user_mode_only=False)
    uffd.register(memory.address, SMALL_PAGE, kernel.MISSING)
    uffd.serve(
        lambda: _engine.kernel_writes(memory.address, b"read(2)"),
        lambda fault: uffd.copy(memory.address, _PATTERN),
    )
    expect(_engine.read_memory(memory.address, 8) == b"read(2)" + _PATTERN[7:8], "a system call's write was lost")
    return f"a system call waited for its page{_by(uffd)}"


def _write_async(address: int) -> str:
    """Trace eight pages with the engine, write to two of them, and check that the trace reports exactly these."""
    Userfault()  # if the kernel lacks userfaultfd, this raises an error with a more specific remedy
    trace = _engine.Trace([_engine.MappedSegment(_engine.Space(), address, 8 * SMALL_PAGE)])
    before, after = _engine.PageSet(8), _engine.PageSet(8)
    trace.collect([before])
    for page in (2, 5):
        _engine.write_memory(address + page * SMALL_PAGE, b"w")
    trace.collect([after])
    trace.remove()
    expect(
        not before and after.runs() == [(2, 3), (5, 6)],
        f"pages 2 and 5 were written; traces showed {before.runs()} before and {after.runs()} after",
    )
    return "two writes traced, and no others"


def _write_async_shmem() -> str:
    memory = shared_memory()
    return _write_async(memory.address)


def _write_sync() -> str:
    memory = shared_memory()
    _engine.write_memory(memory.address, _PATTERN)
    uffd = Userfault("wp", "wp-hugetlbfs-shmem")
    uffd.register(memory.address, SMALL_PAGE, kernel.WP)
    uffd.write_protect(memory.address, SMALL_PAGE, True)

    def release(fault: Fault) -> None:
        expect(bool(fault.flags & kernel.FAULT_WP), "the write was not reported as a write-protect fault")
        expect(_engine.read_memory(memory.address, SMALL_PAGE) == _PATTERN, "the write did not wait for its fault")
        uffd.write_protect(memory.address, SMALL_PAGE, False)

    uffd.serve(lambda: _engine.write_memory(memory.address, b"new"), release)
    expect(_engine.read_memory(memory.address, 3) == b"new", "the write was lost")
    return "a writer waited until its page was unprotected"


def _missing_shmem() -> str:
    memory = shared_memory()
    uffd = Userfault("missing-shmem")
    uffd.register(memory.address, SMALL_PAGE, kernel.MISSING)
    seen = uffd.serve(
        lambda: _engine.read_memory(memory.address, SMALL_PAGE), lambda fault: uffd.copy(memory.address, _PATTERN)
    )
    expect(seen == _PATTERN, "the reader did not get the installed contents")
    return "a reader waited for its page"


def _minor_shmem() -> str:
    memory = shared_memory()
    os.pwrite(memory.fileno(), _PATTERN, 0)
    uffd = Userfault("minor-shmem")
    uffd.register(memory.address, SMALL_PAGE, kernel.MINOR)

    def map_it(fault: Fault) -> None:
        expect(bool(fault.flags & kernel.FAULT_MINOR), "the access was not reported as a minor fault")
        uffd.map_existing(memory.address, SMALL_PAGE)

    seen = uffd.serve(lambda: _engine.read_memory(memory.address, SMALL_PAGE), map_it)
    expect(seen == _PATTERN, "the reader did not get the contents of the existing page")
    return "a reader waited for its page to be mapped"


def _poison() -> str:
    memory = Anonymous(LARGE_PAGE)
    uffd = Userfault("poison")
    uffd.register(memory.address, 2 * SMALL_PAGE, kernel.MISSING)
    uffd.poison(memory.address, SMALL_PAGE)
    # Without a registration only the poison can make an access fail; an access by the kernel fails with EFAULT, not
    # SIGBUS.
    uffd.unregister(memory.address, 2 * SMALL_PAGE)
    _engine.kernel_reads(memory.address + SMALL_PAGE)
    with contextlib.suppress(OSError):
        _engine.kernel_reads(memory.address)
        raise Unavailable("a poisoned page could be read")
    return "access to a poisoned page fails"


def _probe(name: str, attempt: Callable[[], str], release: str) -> Probe:
    remedies = {**unknown_to_kernel(newer_kernel(release, "CONFIG_USERFAULTFD")), errno.EPERM: _PRIVILEGE}
    return Probe(name, attempt, newer_kernel(release, "CONFIG_USERFAULTFD"), remedies)


PROBES = (
    _probe("userfaultfd", _userfaultfd, "5.11"),
    _probe("userfaultfd-kernel-faults", _kernel_faults, "4.3"),
    _probe("uffd-wp-async-shmem", _write_async_shmem, "6.7"),
    _probe("uffd-wp-sync", _write_sync, "5.19"),
    _probe("uffd-missing-shmem", _missing_shmem, "4.11"),
    _probe("uffd-minor-shmem", _minor_shmem, "5.14"),
    _probe("uffd-poison", _poison, "6.6"),
)
