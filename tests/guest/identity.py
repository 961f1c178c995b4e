"""Guest that reports its clocks and random numbers on the serial line (see identity.rs)."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

from tests.guest.compiler import compile_program
from tests.guest.initrd import archive
from tests.guest.machines import GuestParts
from tests.guest.serial import BOOT, Serial

SOURCE = Path(__file__).with_name("identity.rs")

_LINE = re.compile(r"FERRY identity (\d+) up=(\d+) wall=(\d+) rtc=(\d*) random=([0-9a-f]{32})\r?\n")


@dataclass(frozen=True, slots=True)
class Report:
    """Line that the guest has printed."""

    number: int
    up: int
    """Time since the start of the program, ms."""
    wall: int
    """System time of the guest, seconds since 1970."""
    rtc: int
    """Time of the RTC, seconds since 1970."""
    random: str


def parts(qemu: Path, kernel: Path, folder: Path) -> GuestParts:
    """Return the parts of the guest. `folder`: directory for its program and initrd. Raises the same errors as
    `compile_program`."""
    program = compile_program(SOURCE, folder / "identity", "-Ctarget-feature=+crt-static", "-Cstrip=symbols")
    initrd = folder / "identity.cpio"
    initrd.write_bytes(archive(program.read_bytes()))
    return GuestParts(qemu, kernel, initrd)


def reports(serial: Serial) -> list[Report]:
    """Return all lines of the guest until now."""
    found = _LINE.findall(serial.text)
    return [Report(int(number), int(up), int(wall), int(rtc or 0), random) for number, up, wall, rtc, random in found]


async def wait_for(serial: Serial, count: int, timeout: float = BOOT) -> list[Report]:
    """Wait until the guest has printed `count` lines, and return them. Raises TimeoutError after `timeout` seconds."""
    async with asyncio.timeout(timeout):
        while len(reports(serial)) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return reports(serial)
