"""Guest of one disk sector: it replies to bytes on its serial line, and powers off when the power button is pressed.

The code runs in real mode after the BIOS, on QEMU's default PC machine. It enables the power button of ACPI, prints a
prompt on the first serial port, and polls both. Each byte received is sent back with the next code: `a` becomes `b`.
"""

from __future__ import annotations

from pathlib import Path

PROMPT = b">"

_CODE = bytes.fromhex(
    "ba0206 b80001 ef"  # out 0x602, 0x100: PM1 enable register, power button
    "baf803 b03e ee"  # out 0x3f8, '>'
    "fb"  # sti: the timer of the BIOS ends each hlt
    "f4"  # loop: hlt
    "bafd03 ec a801 7406"  # line status register, data ready; otherwise continue at `power`
    "baf803 ec 40 ee"  # in al, 0x3f8; inc ax; out 0x3f8, al
    "ba0006 ed f6c401 74e8"  # power: PM1 status register, power button; otherwise continue at `loop`
    "ba0406 b80020 ef"  # out 0x604, 0x2000: PM1 control register, soft-off
    "ebfe"  # until QEMU has handled it
)


def options(folder: Path) -> list[str]:
    """Create the disk of the guest in a folder. Return the QEMU options of the disk."""
    disk = folder / "boot-sector"
    disk.write_bytes(_CODE.ljust(510, b"\0") + b"\x55\xaa" + bytes((1 << 20) - 512))
    return ["-drive", f"file={disk},format=raw,if=ide,snapshot=on"]
