"""Probes of page tables and huge pages: each probe creates mappings or huge pages, and checks the page table for
them."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from pageferry import _engine
from pageferry._engine import Advice
from pageferry.host.probes import kernel
from pageferry.host.probes.child import Unavailable
from pageferry.host.probes.kernel import LARGE_PAGE, SMALL_PAGE, Anonymous, expect, shared_memory
from pageferry.host.probes.probe import AS_ROOT, Probe, newer_kernel, unknown_to_kernel

THP = Path("/sys/kernel/mm/transparent_hugepage")
HUGETLB = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

_COMPACT = "make a huge page available: free memory, and write 1 to /proc/sys/vm/compact_memory as root"
_THP = newer_kernel("6.1", "CONFIG_TRANSPARENT_HUGEPAGE")


def mode(switch: str) -> str:
    """Return the selected value of a transparent huge page switch (`enabled`, `shmem_enabled`).

    Raises Unavailable if the kernel does not have the switch.
    """
    try:
        text = (THP / switch).read_text()
    except FileNotFoundError:
        raise Unavailable("the kernel has no transparent huge pages", error=errno.ENOSYS) from None
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else text.strip()


def _pagemap_scan() -> str:
    memory = Anonymous(LARGE_PAGE)
    page = [memory.address + number * SMALL_PAGE for number in range(17)]
    for touched in (3, 4, 11):
        _engine.write_memory(page[touched], b"t")
    found = kernel.present(page[0], page[16] - page[0])
    expect(
        found == [(page[3], page[5]), (page[11], page[12])],
        f"pages 3, 4 and 11 at {page[0]:#x} were written; the scan found {[(hex(a), hex(b)) for a, b in found]}",
    )
    return "three written pages found, and no others"


def _populate() -> str:
    memory, unfilled = shared_memory(), shared_memory()
    for mapping, advice in ((memory, Advice.POPULATE_WRITE), (unfilled, Advice.POPULATE_READ)):
        start, length = mapping.address, 16 * SMALL_PAGE
        kernel.madvise(start, length, advice)
        expect(kernel.present(start, length) == [(start, start + length)], f"{advice} left pages unmapped")
    return "pages mapped ahead of their first access"


def _collapse() -> str:
    memory = shared_memory()
    _engine.write_memory(memory.address, b"kept")
    _engine.Space().collapse(memory.address, LARGE_PAGE)
    expect(memory.large_units() == [True], "the call succeeded, but left base pages")
    expect(_engine.read_memory(memory.address, 4) == b"kept", "the contents were lost")
    return "base pages of a memfd collapsed into a huge page"


def _large_tmpfs() -> str:
    folder = _engine.large_tmpfs(2 * LARGE_PAGE)
    file = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
    os.ftruncate(file, LARGE_PAGE)
    memory = _engine.Mapping(file, LARGE_PAGE)
    _engine.write_memory(memory.address, b"first")
    if memory.large_units() != [True]:
        if mode("shmem_enabled") == "deny":
            raise Unavailable(
                f"{THP}/shmem_enabled is set to deny", remedy=f"write never to {THP}/shmem_enabled, as root"
            )
        raise Unavailable("the first access allocated a base page", remedy=_COMPACT)
    return "huge pages at first access, in a detached mount"


def _anonymous_large_page() -> Anonymous:
    found = mode("enabled")
    if found == "never":
        raise Unavailable(f"{THP}/enabled is set to never", remedy=f"write madvise to {THP}/enabled, as root")
    memory = Anonymous(LARGE_PAGE)
    kernel.madvise(memory.address, LARGE_PAGE, Advice.HUGEPAGE)
    _engine.write_memory(memory.address, b"first")
    if not kernel.large_pages_mapped(memory.address):
        raise Unavailable(f"set to {found}, but the first access allocated a base page", remedy=_COMPACT)
    return memory


def _break_large_page() -> str:
    memory = _anonymous_large_page()
    kernel.madvise(memory.address, SMALL_PAGE, Advice.COLD)
    expect(not kernel.large_pages_mapped(memory.address), "the huge page was not split")
    expect(_engine.read_memory(memory.address, 5) == b"first", "the contents were lost")
    return "a huge page split by MADV_COLD on a part of it"


def _hugetlb() -> str:
    pool = {name: int((HUGETLB / f"{name}_hugepages").read_text()) for name in ("nr", "free", "resv", "nr_overcommit")}
    found = f"{pool['free']} of {pool['nr']} pages of 2 MiB free, {pool['nr_overcommit']} more on demand"
    try:
        memory = shared_memory(flags=os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    except OSError as refused:
        if refused.errno != errno.ENOMEM:
            raise
        raise Unavailable(found, error=errno.ENOMEM) from None
    kernel.madvise(memory.address, LARGE_PAGE, Advice.POPULATE_WRITE)
    return found


PROBES = (
    Probe("pagemap-scan", _pagemap_scan, newer_kernel("6.7", "CONFIG_PROC_PAGE_MONITOR")),
    Probe("madv-populate", _populate, newer_kernel("5.14")),
    Probe(
        "madv-collapse",
        _collapse,
        _THP,
        {
            errno.EPERM: f"{AS_ROOT} (CAP_SYS_NICE); newer kernels require it only for other processes",
            errno.ENOMEM: _COMPACT,
            errno.EAGAIN: _COMPACT,
        },
    ),
    Probe(
        "large-tmpfs",
        _large_tmpfs,
        _THP,
        {errno.EPERM: f"{AS_ROOT} (CAP_SYS_ADMIN), or collapse arenas and start guests with --hugetlb"},
    ),
    Probe("break-large-page", _break_large_page, newer_kernel("5.4", "CONFIG_TRANSPARENT_HUGEPAGE")),
    Probe(
        "hugetlb",
        _hugetlb,
        "set sysctl vm.nr_hugepages to guest memory divided by 2 MiB; only for --hugetlb",
        {
            **unknown_to_kernel(newer_kernel("4.14", "CONFIG_HUGETLBFS")),
            errno.ENOENT: newer_kernel("4.14", "CONFIG_HUGETLBFS"),
        },
    ),
)
