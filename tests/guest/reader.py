"""Boot sector of a guest without an operating system that reads from a disk on request.

The guest receives commands, one byte each, on its serial line. On `r`, the guest fills a buffer, prints `B`, and reads
32 KiB at offset 1 MiB of the disk into the buffer. The guest reads through the BIOS, so one request is in flight. The
guest then prints `fresh` if the buffer holds the contents of the disk, otherwise `stale`. On `v`, the guest only checks
the buffer. On `l`, the guest reads repeatedly, and prints only `stale`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BUFFER = 0x10000
"""Guest-physical address of the buffer."""
LENGTH = 32 << 10

_SOURCE = """
.code16
.globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7000, %sp
    sti
    movb %dl, drive
    movw $0x1000, %ax
    movw %ax, %es
next:
    testb $1, forever
    jnz go
    movw $0x3fd, %dx
    inb %dx, %al
    testb $1, %al
    jz next
    movw $0x3f8, %dx
    inb %dx, %al
    cmpb $'l', %al
    jne 1f
    movb $1, forever
1:
    cmpb $'v', %al
    je verify
    cmpb $'r', %al
    jne next
    movb $'B', %al
    call put
go:
    xorw %di, %di           # 32 KiB of "SSSS..."
    movw $0x4000, %cx
    movw $0x5353, %ax
    cld
    rep stosw
    movb $0x42, %ah
    movb drive, %dl
    movw $packet, %si
    int $0x13
    jc failed
verify:
    xorw %si, %si
    movw $0x800, %cx        # each 16 bytes begin with "di"
2:
    cmpw $0x6964, %es:(%si)
    jne stale
    addw $16, %si
    loop 2b
    testb $1, forever
    jnz next
    movw $word_fresh, %si
    jmp say
stale:
    movw $word_stale, %si
    jmp say
failed:
    movw $word_failed, %si
say:
    lodsb
    testb %al, %al
    jz next
    call put
    jmp say
put:
    movw $0x3f8, %dx
    outb %al, %dx
    ret
drive: .byte 0
forever: .byte 0
word_fresh: .asciz " fresh\\n"
word_stale: .asciz " stale\\n"
word_failed: .asciz " failed\\n"
.balign 4
packet:
    .byte 16, 0
    .word 64                # sectors
    .word 0, 0x1000
    .quad 2048              # first sector
.org 510
    .word 0xaa55
"""


def boot_sector(folder: Path) -> bytes:
    """Assemble and link the boot sector in `folder`, and return it. Skip the test as `assemble` does."""
    return assemble(_SOURCE, folder)


def assemble(text: str, folder: Path) -> bytes:
    """Assemble and link the source of a boot sector in `folder`, and return the boot sector.

    Skip the test if there is no assembler or linker.
    """
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("no assembler or no linker, which build the boot sector of the guest")
    source, target, binary = folder / "boot.s", folder / "boot.o", folder / "boot.bin"
    source.write_text(text)
    subprocess.run(["as", "--32", "-o", target, source], check=True, timeout=30)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", str(binary), str(target)]
    subprocess.run(link, check=True, timeout=30, stderr=subprocess.DEVNULL)
    return binary.read_bytes()
