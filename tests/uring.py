"""Minimal io_uring bindings for tests: one ring, reads with and without registered buffers."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import Final

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_GETEVENTS: Final = 1
_REGISTER_BUFFERS: Final = 0
_READ_FIXED, _READ = 4, 22
_SQES: Final = 0x10000000
_ENTRIES: Final = 8
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Ring:
    """io_uring instance. The constructor raises OSError if the kernel or a security policy does not allow io_uring."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(120)
        self._fd = _call(_SETUP, _ENTRIES, parameters)
        fields = struct.unpack_from("<10I 9I Q 7I", parameters)
        entries = fields[1]
        self._sq_tail, self._sq_mask, self._sq_array = fields[11], fields[12], fields[16]
        (self._cq_head, self._cq_tail, self._cq_mask, _, _, self._cqes, _) = struct.unpack_from("<7I", parameters, 80)
        length = max(self._sq_array + 4 * _ENTRIES, self._cqes + 16 * entries)
        self._rings = mmap.mmap(self._fd, length, mmap.MAP_SHARED, offset=0)
        self._sqes = mmap.mmap(self._fd, 64 * _ENTRIES, mmap.MAP_SHARED, offset=_SQES)

    def register(self, address: int, length: int) -> None:
        """Register a memory range as the buffer with index 0. The kernel pins its pages."""
        vector = struct.pack("<QQ", address, length)
        _call(_REGISTER, self._fd, _REGISTER_BUFFERS, vector, 1)

    def read(self, file: int, address: int, length: int, offset: int, *, fixed: bool) -> int:
        """Read from a file into memory, and wait for completion. `fixed`: read into the registered buffer.

        Return the number of bytes read, or a negative errno.
        """
        opcode = _READ_FIXED if fixed else _READ
        entry = struct.pack("<BBHiQQIIQHHi", opcode, 0, 0, file, offset, address, length, 0, 1, 0, 0, 0)
        tail = self._word(self._sq_tail)
        slot = tail & self._word(self._sq_mask)
        self._sqes[64 * slot : 64 * slot + 64] = entry.ljust(64, b"\0")
        self._store(self._sq_array + 4 * slot, slot)
        self._store(self._sq_tail, tail + 1)
        _call(_ENTER, self._fd, 1, 1, _GETEVENTS, None, 0)
        head = self._word(self._cq_head)
        at = self._cqes + 16 * (head & self._word(self._cq_mask))
        result = int(struct.unpack_from("<Qi", self._rings, at)[1])
        self._store(self._cq_head, head + 1)
        return result

    def _word(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._rings, at)[0])

    def _store(self, at: int, value: int) -> None:
        struct.pack_into("<I", self._rings, at, value)
