"""Command lines of test guests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.guest.serial import Serial


@dataclass(frozen=True, slots=True)
class GuestParts:
    """Programs and files in the command line of a guest."""

    qemu: Path
    kernel: Path
    initrd: Path | None = None
    """Path of the initrd; None for the payload, which needs no initrd."""
    accel: str = "tcg"
    states: Path | None = None
    """Folder for the saved states of guests (see `booted`), shared by all processes of a test session. If None, each
    guest is booted."""

    def command(self, serial: Serial, *options: str, memory: str = "256M", checker: str = "ferry.mib=64") -> list[str]:
        """Return the command line of a guest that boots the checker or the payload.

        `checker`: options of the checker or payload (see checker.rs, payload.rs).
        """
        # no_timer_check: on a busy machine, the kernel's check of the timer could fail, and the kernel would panic.
        boot = ["-kernel", str(self.kernel), "-append", f"console=ttyS0 quiet no_timer_check {checker}"]
        if self.initrd is not None:
            boot += ["-initrd", str(self.initrd)]
        return [*self.bare("-m", memory, "-serial", f"file:{serial.path}"), *boot, *options]

    def bare(self, *options: str) -> list[str]:
        """Return the command line of a machine without a guest system."""
        return [str(self.qemu), "-accel", self.accel, "-display", "none", "-nodefaults", "-sandbox", "on", *options]
