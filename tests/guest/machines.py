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
    initrd: Path

    def command(self, serial: Serial, *options: str, memory: str = "256M", checker: str = "ferry.mib=64") -> list[str]:
        """A guest that boots the checker; `checker`: its options, see checker.rs."""
        boot = ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", f"console=ttyS0 quiet {checker}"]
        return [*self.bare("-m", memory, "-serial", f"file:{serial.path}"), *boot, *options]

    def bare(self, *options: str) -> list[str]:
        """A machine without a guest, which is enough for much."""
        return [str(self.qemu), "-accel", "tcg", "-display", "none", "-nodefaults", "-sandbox", "on", *options]
