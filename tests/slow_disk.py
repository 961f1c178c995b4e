"""Disk that completes reads on request: a FUSE file system with one file, read without the page cache.

The kernel pins the pages of a reader while its request is in flight, as it does for `O_DIRECT` on any disk. Reads at
offsets below `HELD` complete immediately. All other reads are held, and the process prints `held OFFSET LENGTH` for
each. Commands on standard input:

- `answer`: complete all held reads
- `delay SECONDS`: complete all held reads, and each later read after SECONDS
- `hold`: hold later reads again
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.fuse_file import ASYNC_DIO, DIRECT_IO, NAME, SECTOR, Server, mount, mounted, run
from tests.kernel.programs import Program

SIZE: Final = 8 << 20
HELD: Final = 1 << 20
"""Offset from which on reads are held, bytes."""


def contents(offset: int, length: int) -> bytes:
    """Return the contents of a range of the disk. Each 16-byte record contains the number of its sector."""
    first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
    data = b"".join(b"disk%012x" % sector * (SECTOR // 16) for sector in range(first, last))
    return data[offset - first * SECTOR :][:length]


class SlowDisk:
    """Slow disk, served by a separate process."""

    def __init__(self, folder: Path, program: Program) -> None:
        self.path = folder / NAME
        self._program = program

    def held(self) -> tuple[int, int]:
        """Wait for the next held read; return its offset and length."""
        word, offset, length = self._program.line().split()
        assert word == "held"
        return int(offset), int(length)

    def answer(self) -> None:
        """Complete all held reads."""
        self._program.say("answer")

    def delay(self, seconds: float) -> None:
        """Complete all held reads, and each later read after `seconds`."""
        self._program.say(f"delay {seconds}")

    def hold(self) -> None:
        """Hold all later reads."""
        self._program.say("hold")


@contextmanager
def slow_disk(folder: Path, boot_sector: bytes = b"") -> Iterator[SlowDisk]:
    """Create `folder`, mount the disk on it, and yield the disk.

    The disk begins with `boot_sector`. Skip the test if FUSE is not available.
    """
    boot = folder.parent / "boot"
    boot.write_bytes(boot_sector)
    with mounted(folder, "tests.slow_disk", str(boot)) as program:
        if isinstance(program, str):
            pytest.skip(program)
        yield SlowDisk(folder, program)


class _Server(Server):
    session_flags = ASYNC_DIO
    open_flags = DIRECT_IO

    def __init__(self, device: int, boot_sector: bytes) -> None:
        super().__init__(device, SIZE)
        self._boot = boot_sector
        self._lock = threading.Lock()
        self._held: list[tuple[int, int, int]] = []
        self._delay: float | None = None

    def obey(self) -> None:
        for line in sys.stdin:
            match line.split():
                case ["answer"]:
                    self._answer_all()
                case ["delay", seconds]:
                    self._delay = float(seconds)
                    self._answer_all()
                case ["hold"]:
                    self._delay = None

    def read(self, unique: int, offset: int, length: int) -> None:
        """Complete a read at once, after the delay, or when `obey` reads `answer`."""
        length = max(0, min(length, SIZE - offset))
        if offset < HELD:
            self.reply(unique, (self._boot + contents(len(self._boot), HELD))[offset:][:length])
            return
        if self._delay is not None:
            threading.Timer(self._delay, self._answer, (unique, offset, length)).start()
            return
        with self._lock:
            self._held.append((unique, offset, length))
        print("held", offset, length, flush=True)

    def write(self, unique: int, offset: int, data: bytes) -> None:
        """Drop the data: a later read returns the original contents."""
        self.written(unique, len(data))

    def _answer_all(self) -> None:
        with self._lock:
            held, self._held = self._held, []
        for request in held:
            self._answer(*request)

    def _answer(self, unique: int, offset: int, length: int) -> None:
        self.reply(unique, contents(offset, length))


def main(folder: str, boot: str) -> None:
    """Mount the disk on `folder`, and serve it until it is unmounted. `boot`: path of the boot sector."""
    if (device := mount(folder)) is not None:
        server = _Server(device, Path(boot).read_bytes())
        run(server, threading.Thread(target=server.obey, daemon=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
