"""Programs in 32-bit or 64-bit assembly, without a C library, that run until they are killed."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BOARD = 0x10000000
"""Address of the shared counters in a program that maps its standard input (`MAP_BOARD`)."""
DEADLINE = 20.0

MAP_BOARD = f"""
    mov $9, %eax
    mov ${BOARD}, %edi
    mov $4096, %esi
    mov $3, %edx
    mov $0x11, %r10d
    xor %r8d, %r8d
    xor %r9d, %r9d
    syscall
"""
"""mmap(BOARD, 4096, READ | WRITE, SHARED | FIXED, 0, 0) in 64-bit code."""


class Program:
    """Program under test, and the counters that it shares with the test."""

    def __init__(self, process: subprocess.Popen[bytes], board: mmap.mmap) -> None:
        self.process, self.pid = process, process.pid
        self._words = (ctypes.c_uint64 * 512).from_buffer(board)

    def __getitem__(self, word: int) -> int:
        return int(self._words[word])

    def __setitem__(self, word: int, value: int) -> None:
        self._words[word] = value

    def passes(self, word: int, value: int, seconds: float = DEADLINE) -> bool:
        """Return whether a counter exceeds `value` before the program exits and within `seconds`."""
        deadline = time.monotonic() + seconds
        while self[word] <= value:
            if time.monotonic() > deadline or self.process.poll() is not None:
                return False
            time.sleep(0.0002)
        return True


@contextmanager
def running(source: str, folder: Path, bits: int = 64) -> Iterator[Program]:
    """Assemble and start a program, and kill the program after the block.

    Skip the test if there is no assembler or linker, or if the kernel cannot run the program.
    """
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("no assembler or no linker (binutils)")
    path = folder / f"program{bits}"
    subprocess.run(["as", f"--{bits}", "-o", f"{path}.o", "-"], input=source.encode(), check=True)
    emulation = "elf_i386" if bits == 32 else "elf_x86_64"
    subprocess.run(["ld", "-m", emulation, "-z", "noexecstack", "-o", str(path), f"{path}.o"], check=True)
    memory = os.memfd_create("board")
    os.ftruncate(memory, 4096)
    board = mmap.mmap(memory, 4096)
    try:
        process = subprocess.Popen([str(path)], stdin=memory, cwd=folder)
    except OSError as refused:
        pytest.skip(f"this kernel cannot run {bits}-bit programs ({refused})")
    finally:
        os.close(memory)
    try:
        yield Program(process, board)
    finally:
        process.kill()
        process.wait()
