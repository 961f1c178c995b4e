"""Process whose memory other processes trace, place and populate. Its commands access single pages.

`Target` starts the process and sends commands; `python -m tests.kernel.target` is the process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from pageferry._engine import LARGE_PAGE, SMALL_PAGE, MappedSegment, Mapping, Sampler, Space, Trace
from tests.kernel.programs import Program


class Target(Program):
    """Process that inherits the given descriptors under the same numbers."""

    def __init__(self, *descriptors: int) -> None:
        super().__init__("-m", "tests.kernel.target", pass_fds=descriptors)
        assert self.line() == "ready"

    @property
    def pid(self) -> int:
        return self.process.pid

    def order(self, name: str, *arguments: Any) -> Any:
        """Execute a command in the process, and return its result."""
        self.say(json.dumps([name, *arguments]))
        return self.json()


_mappings: list[Mapping] = []
_traces: list[Trace] = []
_memories: list[mmap.mmap] = []
_samplers: list[Sampler] = []


def _map(fd: int, length: int) -> int:
    """Map a descriptor, and return the address."""
    _mappings.append(Mapping(fd, length))
    return _mappings[-1].address


def _write(address: int, pages: list[int], byte: int) -> None:
    for page in pages:
        ctypes.memset(address + page * SMALL_PAGE + 7, byte, 1)


def _touch(address: int, pages: int, write: bool) -> int:
    """Read or write one byte of each page. Return the number of page faults, minor and major."""
    step: Callable[[int, int, int], object] = ctypes.memset if write else _read
    scratch = ctypes.create_string_buffer(1)
    places = [address + page * SMALL_PAGE for page in range(pages)]
    for _ in range(pages):  # first access the pages of the interpreter itself, so that their faults are not counted
        step(ctypes.addressof(scratch), 1, 1)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for place in places:
        step(place, 1, 1)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_minflt - before.ru_minflt + after.ru_majflt - before.ru_majflt


def _read(address: int, _: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def _trace(pid: int, address: int, length: int) -> None:
    """Install a write trace on a range of another process's memory."""
    _traces.append(Trace([MappedSegment(Space(pid), address, length)]))


def _anonymous(length: int) -> int:
    """Map private memory on huge pages, fill it with ones, and return its address, which is aligned to 2 MiB."""
    memory = mmap.mmap(-1, length + 2 * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # Keep a gap on both sides: the kernel would merge adjacent mappings of the same kind.
    address = (start + LARGE_PAGE) // LARGE_PAGE * LARGE_PAGE
    ctypes.memset(address, 1, length)
    _memories.append(memory)
    return address


def _read_pages(address: int, pages: list[int]) -> None:
    for page in pages:
        _read(address + page * SMALL_PAGE + 11, 0, 1)


def _peek(address: int, pages: list[int]) -> list[int]:
    """Return, for each page, the byte that the command `write` sets."""
    return [_read(address + page * SMALL_PAGE + 7, 0, 1)[0] for page in pages]


def _sum(address: int, length: int) -> int:
    """Return the sum of all bytes in a range, which changes if a single byte changes."""
    return sum(ctypes.string_at(address, length))


def _split(pid: int, pages: list[int], shared: bool) -> None:
    """Split the PMD mappings of huge pages of another process, and keep them split until this process exits."""
    sampler = Sampler(Space(pid))
    sampler.hold(pages)
    sampler.split(pages, marked=shared)
    _samplers.append(sampler)


def _call(name: str, address: int, length: int) -> None:
    """Call the function `name`, munmap(2) or mlock(2), for a range."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(ctypes.c_void_p(address), ctypes.c_size_t(length)):
        raise OSError(ctypes.get_errno(), name)


def _discard(address: int, length: int) -> None:
    """Call madvise(MADV_DONTNEED), which unmaps the pages and keeps the contents of the file."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), 4):
        raise OSError(ctypes.get_errno(), "madvise")


_ORDERS: dict[str, Callable[..., Any]] = {
    "map": _map,
    "write": _write,
    "touch": _touch,
    "trace": _trace,
    "discard": _discard,
    "anonymous": _anonymous,
    "read": _read_pages,
    "peek": _peek,
    "sum": _sum,
    "split": _split,
    "call": _call,
}


def main() -> None:
    """Execute the commands read from standard input."""
    os.write(1, b"ready\n")
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        os.write(1, json.dumps(_ORDERS[name](*arguments)).encode() + b"\n")


if __name__ == "__main__":
    main()
