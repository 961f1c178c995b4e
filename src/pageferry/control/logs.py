"""Logs of guests: the output of a detached QEMU, while it runs and after it has ended."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import IO, Unpack

from pageferry import values
from pageferry.control.options import LogArguments, LogOptions
from pageferry.errors import NoSuchWorkload, UnsupportedError, UsageError
from pageferry.host import endings, files
from pageferry.host.blocking import in_thread, synchronous
from pageferry.host.registry import ArenaEntry, Folder, QemuEntry, Registry, check_name

_POLL = 0.2
"""Interval at which a followed log is read, seconds."""
_CHUNK = 1 << 16


async def logs_async(name: str, **options: Unpack[LogArguments]) -> str:
    """Return the output of a detached guest, which may have ended. Bytes that are not UTF-8 are replaced.

    `options` are the fields of `pageferry.control.options.LogOptions`: lines (number of last lines).

    Raises NoSuchWorkload if no workload of this name runs or is known to have ended, UnsupportedError if it has no log.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> pageferry.stop("web")
        >>> print(pageferry.logs("web", lines=10))  # empty: QEMU has printed nothing
        <BLANKLINE>
    """
    chosen = values.options(LogOptions, options)
    with opened(name) as (file, _):
        return (await in_thread(_read, file, chosen.lines)).decode(errors="replace")


logs = synchronous(logs_async)


async def follow(name: str, options: LogOptions, *, once: bool = False) -> AsyncIterator[bytes]:
    """Yield the output that `logs_async` returns and, unless `once`, all further output until the guest ends. Raises
    the same errors."""
    with opened(name) as (file, entry):
        await in_thread(_seek, file, options.lines)
        alive = True
        while alive:
            alive = not once and entry is not None and entry.alive  # before the read: output may precede the end
            while data := await in_thread(file.read, _CHUNK):
                yield data
            if alive:
                await asyncio.sleep(_POLL)


def forget(name: str) -> None:
    """Remove the record and the log of a workload that has ended. Raises NoSuchWorkload, UsageError if it runs."""
    check_name(name)
    registry = Registry()
    if name in registry.entries():
        raise UsageError(f"cannot remove the log of {name}: the workload is running; run `pageferry stop {name}` first")
    with registry.locked():
        existed = endings.remove(registry.path, name)
    if not existed:
        raise NoSuchWorkload(
            f"cannot remove the log of {name}: no workload of this name has ended; see `pageferry list --all`"
        )


@contextmanager
def opened(name: str) -> Iterator[tuple[IO[bytes], QemuEntry | None]]:
    """Open the log of a guest for the block. Yield the file and the entry of the guest, which is None if the guest has
    ended. Raises the same errors as `logs_async`."""
    registry = Registry()
    try:
        entry = registry.lookup(name)
    except NoSuchWorkload as missing:
        if endings.find(registry.path, name) is None:
            raise NoSuchWorkload(f"{missing}; `pageferry list --all` shows the workloads that have ended") from missing
        path, entry = endings.log_path(registry.path, name), None
    else:
        path = Folder(registry, name).path / endings.LOG
    try:
        descriptor = files.open_regular(path, follow=False)
    except FileNotFoundError as missing:
        raise UnsupportedError(f"cannot read the log of {name}: {_why(entry)}") from missing
    with open(descriptor, "rb", buffering=0) as file:
        yield file, entry if isinstance(entry, QemuEntry) else None


def _why(entry: object) -> str:
    match entry:
        case QemuEntry(adopted=True):
            return "the guest was adopted, and its output belongs to the program that started it"
        case ArenaEntry(pid=pid):
            return f"the workload is an arena, and its output is that of process {pid}"
        case None:
            return "the guest wrote to a terminal, or was not started by pageferry"
        case _:
            return "the guest writes to the terminal on which it was started; use --detach to write a log"


def _read(file: IO[bytes], lines: int | None) -> bytes:
    _seek(file, lines)
    return b"".join(iter(lambda: file.read(_CHUNK), b""))


def _seek(file: IO[bytes], lines: int | None) -> None:
    """Set the position of a file to the beginning of its last `lines` lines; None: to the beginning of the file."""
    end = left = at = 0
    if lines is not None:
        end, left = file.seek(0, os.SEEK_END), lines
        at = end if lines > 0 else 0
    while at > 0:
        start = max(at - _CHUNK, 0)
        data = os.pread(file.fileno(), at - start, start)
        found = len(data)
        while (found := data.rfind(b"\n", 0, found)) >= 0:
            left -= start + found != end - 1  # that line feed ends the last line
            if left == 0:
                file.seek(start + found + 1)
                return
        at = start
    if lines != 0:
        file.seek(0)
