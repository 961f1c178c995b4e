"""Fake of Firecracker's side of `PUT /snapshot/load` with a page fault handler, written from its interface.

As Firecracker does, the program maps private anonymous memory behind a guard page, registers it for MISSING faults with
a userfaultfd that has EVENT_REMOVE only, and sends the mappings and the userfaultfd in one message. Then it executes
one command per line of its standard input, and prints one JSON object for each. `Handshake` describes how the message
deviates from that of a correct version.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("mmap", "memcpy"):
    getattr(_libc, _name).restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

PAGE, HUGE = 4096, 2 << 20
_SYS_USERFAULTFD, _USER_MODE_ONLY = 323, 1
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_EVENT_REMOVE, _MODE_MISSING = 1 << 3, 1
_PRIVATE_ANONYMOUS, _NORESERVE, _HUGETLB, _HUGE_2M = 0x22, 0x4000, 0x40000, 21 << 26
_DONTNEED = 4


@dataclass(frozen=True)
class Handshake:
    """Handshake to send. The default is that of the newest version."""

    version: tuple[int, int] = (1, 12)
    parts: int = 1
    """Number of messages in which the handshake is sent; the descriptors come with the last one."""
    cut: int | None = None
    """Number of bytes after which the connection is closed."""
    descriptors: tuple[str, ...] = ("userfault",)
    """Descriptors: `userfault` or `pipe`."""
    text: str | None = None
    """Message to send instead of the mappings."""
    change: dict[str, int] | None = None
    """Numbers to add to fields of the last mapping."""
    hidden: int = 0
    """Length of registered memory that the message does not list, bytes."""


def message(mappings: list[tuple[int, int, int]], page_size: int, version: tuple[int, int]) -> list[dict[str, int]]:
    """Return the mappings, each (address, size, offset), as this version of Firecracker sends them."""
    result = []
    for address, size, offset in mappings:
        fields = {"base_host_virt_addr": address, "size": size, "offset": offset}
        if version >= (1, 12):
            fields["page_size"] = page_size
        if version >= (1, 7):
            fields["page_size_kib"] = page_size
        result.append(fields)
    return result


class Memory:
    """Memory of the microVM: one mapping per size, the later ones at lower addresses, as of a microVM above 3 GiB."""

    def __init__(self, sizes: list[int], page_size: int, hidden: int) -> None:
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        self.userfault = _libc.syscall(_SYS_USERFAULTFD, flags)
        if self.userfault < 0:  # no root: only for faults in user mode, which suffice here
            self.userfault = _libc.syscall(_SYS_USERFAULTFD, flags | _USER_MODE_ONLY)
        if self.userfault < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self.userfault, _UFFDIO_API, struct.pack("QQQ", 0xAA, _EVENT_REMOVE, 0))
        self.mappings: list[tuple[int, int, int]] = []
        offset = 0
        for size in sizes:
            self.mappings.append((self._map(size, page_size), size, offset))
            offset += size
        self.hidden = self._map(hidden, page_size) if hidden else 0

    def _map(self, size: int, page_size: int) -> int:
        """Map and register memory, with a guard page before it."""
        guard = max(page_size, PAGE)
        flags = _PRIVATE_ANONYMOUS | _NORESERVE
        start = int(_libc.mmap(None, size + 2 * guard, 0, flags, -1, 0))
        address = -(-(start + PAGE) // guard) * guard
        huge = _HUGETLB | _HUGE_2M if page_size == HUGE else 0
        found = _libc.mmap(address, size, 3, 0x10 | (flags & ~_NORESERVE) | huge, -1, 0)
        if found != address:
            raise OSError(ctypes.get_errno(), "mmap")
        fcntl.ioctl(self.userfault, _UFFDIO_REGISTER, struct.pack("QQQQ", address, size, _MODE_MISSING, 0))
        return address

    def address(self, offset: int) -> int:
        """Return the address of a byte of the memory file."""
        for address, size, start in self.mappings:
            if start <= offset < start + size:
                return address + offset - start
        return self.hidden + offset - sum(size for _, size, _ in self.mappings)

    def read(self, offset: int, length: int) -> bytes:
        """Read memory, without the lock of the interpreter."""
        buffer = ctypes.create_string_buffer(length)
        _libc.memcpy(buffer, self.address(offset), length)
        return buffer.raw

    def write(self, offset: int, contents: bytes) -> None:
        """Write memory."""
        _libc.memcpy(self.address(offset), contents, len(contents))

    def free(self, offset: int, length: int) -> None:
        """Free memory as a balloon does."""
        if _libc.madvise(self.address(offset), length, _DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")

    def stream(self, chunk: int) -> float:
        """Read all memory once, in order. Return the time, seconds."""
        buffer = ctypes.create_string_buffer(chunk)
        begin = time.monotonic()
        for address, size, _ in sorted(self.mappings, key=lambda one: one[2]):
            for at in range(address, address + size, chunk):
                _libc.memcpy(buffer, at, chunk)
        return time.monotonic() - begin

    def access(self, offsets: list[int]) -> list[float]:
        """Read a byte at each offset. Return the times, microseconds."""
        buffer, times = ctypes.create_string_buffer(1), []
        for offset in offsets:
            address = self.address(offset)
            begin = time.perf_counter_ns()
            _libc.memcpy(buffer, address, 1)
            times.append((time.perf_counter_ns() - begin) / 1e3)
        return times

    def sweep(self, threads: int, order: list[int], step: int) -> str:
        """Read `step` bytes at each offset of `order` by several threads. Return the digest of the bytes by offset."""
        found: dict[int, bytes] = {}

        def work(number: int) -> None:
            for offset in order[number::threads]:
                found[offset] = hashlib.sha256(self.read(offset, step)).digest()

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return hashlib.sha256(b"".join(found[offset] for offset in sorted(found))).hexdigest()


def _send(path: str, memory: Memory, page_size: int, chosen: Handshake) -> socket.socket:
    """Connect, and send the handshake. The connection stays open until the program exits."""
    mappings = message(memory.mappings, page_size, chosen.version)
    for name, more in (chosen.change or {}).items():
        mappings[-1][name] += more
    data = (chosen.text if chosen.text is not None else json.dumps(mappings, separators=(",", ":"))).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    descriptors = [memory.userfault if kind == "userfault" else os.pipe()[0] for kind in chosen.descriptors]
    if chosen.cut is not None or not descriptors:
        connection.sendall(data[: chosen.cut])
        connection.shutdown(socket.SHUT_WR)
        return connection
    size = -(-len(data) // chosen.parts)
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    for part in parts[:-1]:
        connection.sendall(part)
        time.sleep(0.02)
    socket.send_fds(connection, parts[-1:], descriptors)
    return connection


def main(argument: str) -> None:
    """Run the program. `argument`: its settings as JSON."""
    settings: dict[str, Any] = json.loads(argument)
    chosen = Handshake(**{**settings["handshake"], "version": tuple(settings["handshake"]["version"])})
    memory = Memory(settings["sizes"], settings["page_size"], chosen.hidden)
    print(json.dumps({"mapped": True}), flush=True)
    connection = _send(settings["socket"], memory, settings["page_size"], chosen)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(_execute(memory, command)), flush=True)
    connection.close()


def _execute(memory: Memory, command: dict[str, Any]) -> dict[str, Any]:
    match command.pop("what"):
        case "read":
            return {"contents": memory.read(**command).hex()}
        case "write":
            memory.write(command["offset"], bytes.fromhex(command["contents"]))
        case "free":
            memory.free(**command)
        case "sweep":
            begin = time.monotonic()
            digest = memory.sweep(**command)
            return {"digest": digest, "seconds": time.monotonic() - begin}
        case "stream":
            return {"seconds": memory.stream(**command)}
        case "access":
            return {"us": memory.access(**command)}
        case "fault":  # a thread of the microVM that accesses memory, whether or not it ever gets it
            threading.Thread(target=memory.read, args=(command["offset"], 1), daemon=True).start()
        case "churn":
            return {"wrong": _churn(memory, **command)}
    return {}


def _churn(memory: Memory, offsets: list[int], step: int) -> list[int]:
    """Free every page of `offsets` while other threads read it. Return those that do not read as zeros afterwards."""
    readers = [
        threading.Thread(target=lambda part=part: [memory.read(offset, 1) for offset in part])
        for part in (offsets[0::2], offsets[::-1])
    ]
    for reader in readers:
        reader.start()
    for offset in offsets:
        memory.free(offset, step)
    wrong = [offset for offset in offsets if memory.read(offset, step).strip(b"\0")]
    for reader in readers:
        reader.join()
    return wrong


def settings(path: str, sizes: list[int], page_size: int = PAGE, handshake: Handshake | None = None) -> str:
    """Return the argument of the program."""
    chosen = asdict(handshake if handshake is not None else Handshake())
    return json.dumps({"socket": path, "sizes": sizes, "page_size": page_size, "handshake": chosen})


if __name__ == "__main__":
    main(sys.argv[1])
