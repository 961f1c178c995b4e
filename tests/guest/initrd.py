"""Builds the initrd of the test guest: our checker as `/init`, and the console device the kernel opens for it."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

CHECKER = Path(__file__).with_name("checker.rs")


def build(folder: Path) -> Path:
    """Compile the checker and pack it; return the initrd, which is rebuilt only when the checker has changed.

    Raises FileNotFoundError where there is no rustc, CalledProcessError where it fails.
    """
    initrd = folder / "checker.cpio"
    if initrd.exists() and initrd.stat().st_mtime > max(CHECKER.stat().st_mtime, Path(__file__).stat().st_mtime):
        return initrd
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "checker"
    subprocess.run(
        ["rustc", "--edition=2024", "-O", "-Ctarget-feature=+crt-static", "-Cpanic=abort", "-Cstrip=symbols"]
        + ["-o", program, CHECKER],
        check=True,
    )
    temporary = folder / f"checker.cpio.{os.getpid()}"
    temporary.write_bytes(archive(program.read_bytes()))
    temporary.rename(initrd)
    return initrd


def archive(init: bytes) -> bytes:
    """An initramfs in cpio's `newc` format (kernel: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    return b"".join(
        [
            _entry("dev", stat.S_IFDIR | 0o755),
            _entry("proc", stat.S_IFDIR | 0o755),
            _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            _entry("init", stat.S_IFREG | 0o755, init),
            _entry("TRAILER!!!", 0),
        ]
    )


def _entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    inode, owner, group, links, modified, checksum = 0, 0, 0, 1, 0, 0
    on_device = (0, 0)
    path = name.encode() + b"\0"
    fields = (inode, mode, owner, group, links, modified, len(content), *on_device, *device, len(path), checksum)
    header = b"070701" + b"".join(b"%08X" % value for value in fields)
    return _padded(header + path) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
