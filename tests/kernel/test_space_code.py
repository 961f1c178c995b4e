"""Injection of system calls: only into 64-bit code, and without breaking the kernel's guarantees to the process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pageferry._engine import MappedSegment, Space, Trace
from tests.kernel.assembled import BOARD, MAP_BOARD, running

COUNT_32 = f"""
.globl _start
_start:
    mov $192, %eax          # mmap2
    mov ${BOARD}, %ebx
    mov $4096, %ecx
    mov $3, %edx
    mov $0x11, %esi
    xor %edi, %edi
    xor %ebp, %ebp
    int $0x80
1:  incl {BOARD}
    jmp 1b
"""

SLEEP_32 = f"""
.globl _start
_start:
    mov $192, %eax
    mov ${BOARD}, %ebx
    mov $4096, %ecx
    mov $3, %edx
    mov $0x11, %esi
    xor %edi, %edi
    xor %ebp, %ebp
    int $0x80
1:  incl {BOARD}
    mov $162, %eax          # nanosleep
    mov $time, %ebx
    xor %ecx, %ecx
    int $0x80
    test %eax, %eax
    jz 1b
    incl {BOARD + 8}        # nanosleep failed
    jmp 1b
.data
time: .long 0, 2000000
"""

SWITCH = f"""
.globl _start
_start:
    {MAP_BOARD}
    mov $0x2b, %eax         # 64-bit code has no data segment
    mov %eax, %ds
    movl $code32, target
    ljmp *target
.code32
code32:
    incl {BOARD}
    jmp code32
.data
target: .long 0, 0x23
"""

NOW_AND_THEN = f"""
.globl _start
_start:
    {MAP_BOARD}
    mov $0x2b, %eax         # 64-bit code has no data segment
    mov %eax, %ds
    movl $code32, target
    movl $code64, back
again:
    mov $5000000, %ecx
1:  dec %ecx
    jnz 1b
    ljmp *target
.code32
code32:
    mov $5000000, %ecx
1:  dec %ecx
    jnz 1b
    incl {BOARD}
    ljmp *back
.code64
code64:
    jmp again
.data
target: .long 0, 0x23
back:   .long 0, 0x33
"""

COMPAT_SLEEP = f"""
.globl _start
_start:
    {MAP_BOARD}
1:  incl {BOARD}
    mov $162, %eax          # nanosleep of 32-bit code, made in 64-bit code
    mov $time, %ebx
    xor %ecx, %ecx
    int $0x80
    test %eax, %eax
    jz 1b
    incl {BOARD + 8}
    jmp 1b
.data
time: .long 0, 20000000
"""

SECTION = f"""
.globl _start
_start:
    {MAP_BOARD}
    mov $334, %eax          # rseq
    mov $area, %edi
    mov $32, %esi
    xor %edx, %edx
    mov $0x53053053, %r10d
    syscall
    neg %rax
    mov %rax, {BOARD + 40}
    mov $1, %rbx            # number of the section
again:
    movq $descriptor, area + 8
first:
    mov %rbx, {BOARD}       # inside of section number ...
wait:
    cmpq $0, {BOARD + 8}
    je wait
    incq {BOARD + 16}       # committed
past:
    movq $0, area + 8
    inc %rbx
    jmp again
    .byte 0x0f, 0xb9, 0x3d
    .long 0x53053053
handler:
    incq {BOARD + 24}       # aborted
    cmpq $0, area + 8
    je 1f
    incq {BOARD + 32}       # the kernel has not cleared the descriptor
1:  inc %rbx
    jmp again
.data
.balign 32
area: .long 0, 0
      .quad 0, 0, 0
.balign 32
descriptor:
    .long 0, 0
    .quad first, past - first, handler
"""


@pytest.mark.parametrize("source", [COUNT_32, SLEEP_32], ids=["computing", "sleeping"])
def test_32_bit_process_is_refused_and_unchanged(source: str, tmp_path: Path) -> None:
    with running(source, tmp_path, bits=32) as program:
        assert program.passes(0, 2)
        before = sorted(tmp_path.iterdir())
        for _ in range(3):
            with pytest.raises(PermissionError, match="runs 32-bit code"):
                Space(program.pid).getppid()
            with pytest.raises(PermissionError, match="runs 32-bit code"):
                Trace([MappedSegment(Space(program.pid), BOARD, 4096)])
        assert program.passes(0, program[0] + 2)
        assert program[1] == 0
        assert sorted(tmp_path.iterdir()) == before


def test_64_bit_process_in_32_bit_code_is_refused_and_unchanged(tmp_path: Path) -> None:
    with running(SWITCH, tmp_path) as program:
        if not program.passes(0, 2):
            pytest.skip("this kernel has no 32-bit code segment")
        with pytest.raises(PermissionError, match="runs 32-bit code"):
            Space(program.pid).getppid()
        assert program.passes(0, program[0] + 2)


def test_64_bit_process_partly_in_32_bit_code_is_called_in_64_bit_code(tmp_path: Path) -> None:
    with running(NOW_AND_THEN, tmp_path) as program:
        if not program.passes(0, 2):
            pytest.skip("this kernel has no 32-bit code segment")
        for _ in range(30):
            assert Space(program.pid).getppid() == os.getpid()
        assert program.passes(0, program[0] + 2)


def test_32_bit_call_of_64_bit_code_is_restarted(tmp_path: Path) -> None:
    with running(COMPAT_SLEEP, tmp_path) as program:
        if not program.passes(0, 2) or program[1]:
            pytest.skip("this kernel does not support 32-bit system calls")
        for _ in range(100):
            assert Space(program.pid).getppid() == os.getpid()
        assert program.passes(0, program[0] + 2)
        assert program[1] == 0


def test_interrupted_restartable_sequence_never_commits(tmp_path: Path) -> None:
    with running(SECTION, tmp_path) as program:
        assert program.passes(0, 0)
        if program[5]:
            pytest.skip(f"this kernel has no restartable sequences (errno {program[5]})")
        committed = 0
        for _ in range(50):
            time.sleep(0.002)  # the section that was released last ends in the meantime
            interrupted = program[0]  # the program stays in this section until the section is aborted
            assert Space(program.pid).getppid() == os.getpid()
            committed += not program.passes(0, interrupted, 0.2)
            program[1] = 1
            assert program.passes(2, 0)
            program[1] = program[2] = 0
        assert committed == 0, f"{committed} of 50 interrupted sections were not aborted"
        assert program[3] >= 50
        assert program[4] == 0
