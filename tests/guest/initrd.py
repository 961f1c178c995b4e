"""Initrd of the test guest: the checker as `/init`, kernel modules, and a console device."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from tests.guest.compiler import compile_program

CHECKER = Path(__file__).with_name("checker.rs")
DISK_CHECKER = Path(__file__).with_name("disk_checker.rs")

BALLOON_MODULES = (
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_balloon",
)
"""Modules required for a virtio balloon, in loading order."""


def build(folder: Path, modules: Sequence[Path] = (), source: Path = CHECKER) -> Path:
    """Compile a checker, and pack it with these kernel modules into an initrd. Return the path of the initrd.

    An unchanged checker is not compiled again. Raises the same errors as `compile_program`.
    """
    name = source.stem.replace("_", "-")
    program = compile_program(source, folder / name, "-Ctarget-feature=+crt-static", "-Cstrip=symbols")
    initrd = folder / f"{name}-{len(modules)}.cpio"
    contents = [(f"{number}-{path.name}", path.read_bytes()) for number, path in enumerate(modules)]
    write(initrd, archive(program.read_bytes(), contents))
    return initrd


def archive(
    init: bytes, modules: Sequence[tuple[str, bytes]] = (), programs: Sequence[tuple[str, bytes]] = ()
) -> bytes:
    """Return an initramfs in cpio's `newc` format. `programs`: paths (`bin/busybox`) and contents.

    The format is described in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    folders = [_entry(name, stat.S_IFDIR | 0o755) for name in ("dev", "proc", "modules", "bin", "root")]
    console = _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    run = [_entry(name, stat.S_IFREG | 0o755, content) for name, content in (("init", init), *programs)]
    loaded = [_entry(f"modules/{name}", stat.S_IFREG | 0o644, content) for name, content in modules]
    return b"".join([*folders, console, *run, *loaded, _entry("TRAILER!!!", 0)])


def write(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(content)
    temporary.rename(path)


def _entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    inode, owner, group, links, modified, checksum = 0, 0, 0, 1, 0, 0
    on_device = (0, 0)
    path = name.encode() + b"\0"
    fields = (inode, mode, owner, group, links, modified, len(content), *on_device, *device, len(path), checksum)
    header = b"070701" + b"".join(b"%08X" % value for value in fields)
    return _padded(header + path) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
