"""Command lines of test guests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.guest.serial import Serial


@dataclass(frozen=True, slots=True)
class GuestParts:
    """Programs and files of a guest's command line, for one QEMU."""

    qemu: Path
    kernel: Path
    initrd: Path | None = None
    """None for the payload, which needs no initrd."""
    accel: str = "tcg"
    states: Path | None = None
    """Folder for the states of booted guests (see `booted`), shared by all processes of a test session; None: each
    guest is booted."""

    def command(self, serial: Serial, *options: str, memory: str = "256M", checker: str = "ferry.mib=64") -> list[str]:
        """Command line of a guest that boots the checker or the payload; `checker`: its options (checker.rs,
        payload.rs).
        """
        # On a busy machine the kernel would find that the timer does not work, and stop.
        boot = ["-kernel", str(self.kernel), "-append", f"console=ttyS0 quiet no_timer_check {checker}"]
        if self.initrd is not None:
            boot += ["-initrd", str(self.initrd)]
        return [*self.bare("-m", memory, "-serial", f"file:{serial.path}"), *boot, *options]

    def bare(self, *options: str) -> list[str]:
        """Command line of a machine without a guest system."""
        return [str(self.qemu), "-accel", self.accel, "-display", "none", "-nodefaults", "-sandbox", "on", *options]
