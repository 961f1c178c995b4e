"""Command lines of test guests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.guest.serial import Serial


@dataclass(frozen=True, slots=True)
class GuestParts:
    """What every command line needs, for one of the QEMUs."""

    qemu: Path
    kernel: Path
    initrd: Path | None = None
    """None: the kernel is the payload, which needs none."""
    accel: str = "tcg"

    def command(self, serial: Serial, *options: str, memory: str = "256M", checker: str = "ferry.mib=64") -> list[str]:
        """A guest that boots the checker or the payload; `checker`: its options, see checker.rs and payload.rs."""
        boot = ["-kernel", str(self.kernel), "-append", f"console=ttyS0 quiet {checker}"]
        if self.initrd is not None:
            boot += ["-initrd", str(self.initrd)]
        return [*self.bare("-m", memory, "-serial", f"file:{serial.path}"), *boot, *options]

    def bare(self, *options: str) -> list[str]:
        """A machine without a guest, which is enough for much."""
        return [str(self.qemu), "-accel", self.accel, "-display", "none", "-nodefaults", "-sandbox", "on", *options]
