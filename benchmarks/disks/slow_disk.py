"""Disk of 50 MB/s: ext4 on a loop device, whose file is served by a FUSE file system at this rate.

Writes to files complete in the page cache of the host, as on any disk. The loop device writes to its file directly,
without a second page cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests import fuse_file
from tests.fuse_file import MAX_PAGES, NAME, Server

RATE: Final = 50_000_000
"""Bytes that the disk reads or writes per second."""
_SPACE: Final = 1 << 30
"""Size of the file system in addition to the file, bytes: for metadata and overlays."""


@contextmanager
def slow_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount the disk on the new directory `folder`, and yield the path of a file of `size` bytes.

    Raises RuntimeError if FUSE is not available, CalledProcessError if there is no loop device.
    """
    contents, device = folder.parent / f"{folder.name}.contents", folder.parent / f"{folder.name}.device"
    with contents.open("wb") as file:
        file.truncate(size + _SPACE)
    with ExitStack() as stack:
        program = stack.enter_context(fuse_file.mounted(device, "benchmarks.disks.slow_disk", str(contents)))
        if isinstance(program, str):
            raise RuntimeError(f"cannot create a slow disk: {program}")
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(device / NAME))
        loop = _run("losetup", "--direct-io=on", "--find", "--show", str(device / NAME))
        stack.callback(_run, "losetup", "--detach", loop)
        folder.mkdir()
        _run("mount", loop, str(folder))
        stack.callback(_run, "umount", str(folder))
        with (folder / NAME).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        yield folder / NAME


def dirty() -> int:
    """Return the number of bytes that the page cache of the machine has not written yet."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Dirty:", "Writeback:")))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class _Server(Server):
    session_flags = MAX_PAGES

    def __init__(self, device: int, contents: str) -> None:
        self._contents = os.open(contents, os.O_RDWR)
        self._free_at = time.monotonic()
        super().__init__(device, os.fstat(self._contents).st_size)

    def read(self, unique: int, offset: int, length: int) -> None:
        self._work(length)
        self.reply(unique, os.pread(self._contents, length, offset))

    def write(self, unique: int, offset: int, data: bytes) -> None:
        self._work(len(data))
        os.pwrite(self._contents, data, offset)
        self.written(unique, len(data))

    def _work(self, length: int) -> None:
        """Wait for the time that a disk needs for this number of bytes. Like a disk, the server handles no other
        request during that time."""
        self._free_at = max(self._free_at, time.monotonic()) + length / RATE
        time.sleep(max(self._free_at - time.monotonic(), 0))


def main(folder: str, contents: str) -> None:
    """Mount the file system on `folder`, and serve it until it is unmounted. `contents`: file with the contents."""
    if (device := fuse_file.mount(folder)) is not None:
        fuse_file.run(_Server(device, contents))


if __name__ == "__main__":
    main(*sys.argv[1:])
