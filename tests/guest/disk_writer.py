"""Guest without an operating system, on a floppy disk, that writes to two other disks and verifies them.

The guest counts in memory. It writes each number to one of 16 sectors of the first disk, and then of the second disk.
After that, it reads this sector and an older one from both disks, and compares them with the numbers that it must have
written there. It prints `.` after 16 numbers, `X` if a sector has other contents, and `E` after an I/O error. If the
memory and one of the disks are not of the same moment, the guest prints `X` within 16 numbers. The guest uses the BIOS,
so one request is in flight.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.guest.disks import drive, qcow2, raw
from tests.guest.reader import assemble
from tests.guest.serial import GuestFailed

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
    movw $0x1000, %ax
    movw %ax, %es
again:
    movl number, %eax
    xorw %di, %di
    movw $128, %cx
    cld
    rep stosl
    call choose
    movb $0x43, request
    movb $0x80, %dl
    call transfer
    movb $0x81, %dl
    call transfer
    movb $0x42, request
    movl number, %eax
    call verify
    movl number, %eax       # an older number: number - ((number - 7 * number) mod 16)
    imull $7, %eax, %ebx
    subl %ebx, %eax
    andl $15, %eax
    movl number, %ebx
    subl %eax, %ebx
    jb next
    movl %ebx, %eax
    call verify
next:
    incl number
    testl $15, number
    jnz again
    movb $'.', %al
    call put
    jmp again
verify:
    movl %eax, wanted
    call choose
    movb $0x80, %dl
    call compare
    movb $0x81, %dl
compare:
    movl $-1, %es:0
    movl $-1, %es:508
    call transfer
    movl wanted, %eax
    cmpl %es:0, %eax
    jne wrong
    cmpl %es:508, %eax
    jne wrong
    ret
wrong:
    movb $'X', %al
    jmp put
choose:
    andl $15, %eax
    shll $3, %eax
    addl $2048, %eax
    movl %eax, sector
    ret
transfer:
    movb request, %ah
    xorb %al, %al
    movw $packet, %si
    int $0x13
    jnc 1f
    movb $'E', %al
    call put
1:  ret
put:
    movw $0x3f8, %dx
    outb %al, %dx
    ret
number: .long 0
wanted: .long 0
request: .byte 0
.balign 4
packet:
    .byte 16, 0
    .word 1
    .word 0, 0x1000
sector: .long 0, 0
.org 510
    .word 0xaa55
"""

SIZE = 8 << 20


class DiskWriter:
    """Files and command line of the guest: a qcow2 disk `a` and a raw disk `b` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.floppy = folder / "floppy"
        self.floppy.write_bytes(assemble(_SOURCE, folder).ljust(1440 << 10, b"\0"))
        self.a = qcow2(folder / "a.qcow2", SIZE)
        self.b = raw(folder / "b.raw", SIZE)

    def options(self, name: str) -> list[str]:
        """Return the options of QEMU for the guest `name`."""
        boot = f"file={self.floppy},format=raw,if=floppy,readonly=on"
        # The BIOS does not negotiate flushes, so QEMU would flush each write.
        disks = (*drive(self.a, "a", "cache=unsafe", kind="qcow2"), *drive(self.b, "b", "cache=unsafe"))
        return ["-m", "64M", "-serial", f"file:{self.serial(name)}", "-drive", boot, "-boot", "a", *disks]

    def serial(self, name: str) -> Path:
        """Return the path of the file with the output of the guest `name`."""
        return self.folder / f"{name}.serial"

    async def writes(self, name: str, count: int = 2, timeout: float = 60.0) -> None:
        """Wait until the guest has written and verified 16 numbers, `count` times. Raises GuestFailed if a sector was
        wrong, or if the guest makes no progress for `timeout` seconds."""
        wanted = self._output(name).count(".") + count
        deadline = asyncio.get_running_loop().time() + timeout
        while (output := self._output(name)).count(".") < wanted:
            if asyncio.get_running_loop().time() > deadline:
                raise GuestFailed(f"{name} made no progress: {output!r}")
            self.check(name)
            await asyncio.sleep(0.02)
        self.check(name)

    def check(self, name: str) -> None:
        """Raise GuestFailed if the guest has found a wrong sector, or had an I/O error."""
        if set(self._output(name)) - {"."}:
            raise GuestFailed(f"{name} has found wrong sectors: {self._output(name)!r}")

    def _output(self, name: str) -> str:
        path = self.serial(name)
        text = path.read_text() if path.exists() else ""
        return "".join(letter for letter in text if letter in ".XE")
