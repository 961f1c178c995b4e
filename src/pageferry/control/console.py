"""Serial consoles of guests: QEMU's character device of the first serial port, as a socket or a pseudo-terminal.

The character device is found on the command line of QEMU (`-serial`) and by QMP `query-chardev`. QEMU serves one client
per socket: a second client could connect, but would wait for the first one. A file lock excludes other consoles of
pageferry, and `query-chardev` shows other clients.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import socket
import stat
from typing import Any, Self

from pageferry import values
from pageferry.control.session import guest_entry, guest_session
from pageferry.errors import UnsupportedError, WorkloadError
from pageferry.host import files, proc
from pageferry.host.blocking import in_thread, synchronous
from pageferry.host.registry import Folder, QemuEntry, Registry
from pageferry.workloads.qemu import option_syntax

_LOCK = "console"
_SOCKET = re.compile(r"(disconnected:)?unix:(.*),server=on")
_PTY = "pty:"
_DEFAULT = "serial0"
"""Label of the character device of the first -serial option, unless the option names a character device."""

_HOW = (
    "start the guest with --detach and without -serial, -nographic and -nodefaults, or add `-chardev "
    "socket,id=console,path=PATH,server=on,wait=off -serial chardev:console`"
)


class Console:
    """Open console of a guest, created by `console`. `close`, or the end of a `with` statement, closes it."""

    def __init__(self, name: str, descriptor: int, lock: int) -> None:
        self.name = name
        self._descriptor = descriptor
        self._lock = lock

    def fileno(self) -> int:
        """Return the descriptor of the console, which is in blocking mode."""
        return self._descriptor

    def read(self, length: int = 1 << 16) -> bytes:
        """Return the next output of the guest, at most `length` bytes; empty if QEMU has closed the console. The call
        blocks until there is output."""
        try:
            return os.read(self._descriptor, length)
        except OSError:  # the other end of a pseudo-terminal is closed
            return b""

    def write(self, data: bytes) -> None:
        """Send input to the guest. The call blocks while the guest does not read. Raises WorkloadError if QEMU has
        closed the console."""
        try:
            files.write_all(self._descriptor, data)
        except OSError as closed:
            raise WorkloadError(
                f"cannot write to the console of {self.name}: QEMU has closed it ({closed.strerror})"
            ) from closed

    def close(self) -> None:
        """Close the console. Another client can then open it."""
        if self._descriptor < 0:
            return
        if stat.S_ISSOCK(os.fstat(self._descriptor).st_mode):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)  # also ends a `read` of another thread
        os.close(self._descriptor)
        os.close(self._lock)
        self._descriptor = self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def console_async(name: str, *, chardev: str | None = None) -> Console:
    """Open the serial console of a guest. `chardev`: id of another character device of QEMU that is a socket of QEMU or
    a pseudo-terminal.

    Raises UnsupportedError if the guest has no such device, WorkloadError if another client has opened it,
    NoSuchWorkload, WorkloadDied.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> with pageferry.console("web") as console:
        ...     console.write(b"root\\n")
        >>> pageferry.stop("web")
    """
    values.optional(values.text, "chardev", chardev)
    registry = Registry()
    entry = guest_entry(name, "open the console of", registry)
    label = chardev if chardev is not None else await in_thread(_serial_label, name, entry)
    lock = _locked(registry.folder(name), label)
    try:
        async with guest_session(name, "open the console of", registry=registry) as (_, monitor):
            path = _path(name, entry, label, await monitor.execute("query-chardev"))
            return Console(name, await in_thread(_open, name, path), lock)
    except BaseException:
        os.close(lock)
        raise


console = synchronous(console_async)


def _serial_label(name: str, entry: QemuEntry) -> str:
    """Return the label of the character device of the first serial port on QEMU's command line. Raises UnsupportedError
    if there is none."""
    # The program may be a loader or a wrapper, whose own options precede those of QEMU, so the syntax is not checked.
    words = proc.arguments(entry.pid)
    for word, value in itertools.pairwise(words):
        if word in ("-serial", "--serial"):
            return value.removeprefix("chardev:") if value.startswith("chardev:") else _DEFAULT
        if word in ("-device", "--device"):
            device = option_syntax.properties(value, "driver")
            if device.get("driver", "").endswith("-serial") and "chardev" in device:
                return device["chardev"]
    if not {"-nographic", "--nographic"}.isdisjoint(words):
        raise UnsupportedError(
            f"cannot open the console of {name}: -nographic connects the serial port to the output of QEMU, which "
            f"`pageferry logs {name}` prints; {_HOW}"
        )
    raise UnsupportedError(f"cannot open the console of {name}: the serial port is not connected; {_HOW}")


def _path(name: str, entry: QemuEntry, label: str, devices: list[dict[str, Any]]) -> str:
    """Return the path of the socket or pseudo-terminal of a character device. Raises UnsupportedError,
    WorkloadError."""
    found = {str(device["label"]): str(device["filename"]) for device in devices}
    if label not in found:
        known = ", ".join(sorted(found))
        raise UnsupportedError(
            f"cannot open the console of {name}: the guest has no character device {label!r}; use one of {known}"
        )
    filename = found[label]
    if filename.startswith(_PTY):
        return filename.removeprefix(_PTY)
    if (matched := _SOCKET.fullmatch(filename)) is None:
        raise UnsupportedError(f"cannot open the console of {name}: character device {label} is {filename!r}; {_HOW}")
    if matched[1] is None:
        raise WorkloadError(
            f"cannot open the console of {name}: another client has opened {matched[2]}; close it first"
        )
    return os.path.join(os.readlink(f"/proc/{entry.pid}/cwd"), matched[2])


def _locked(folder: Folder, label: str) -> int:
    """Return the descriptor of the lock of a character device. Raises WorkloadError if another process has it."""
    descriptor = files.open_private(folder.path / f"{_LOCK}-{re.sub('[^A-Za-z0-9_.-]', '_', label)}.lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as busy:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace")
        os.close(descriptor)
        raise WorkloadError(
            f"cannot open the console of {folder.name}: process {holder} has opened it; detach that process first"
        ) from busy
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _open(name: str, path: str) -> int:
    try:
        if path.startswith("/dev/"):
            return os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.connect(path)
            return connection.detach()
    except OSError as failed:
        raise WorkloadError(f"cannot open the console of {name} at {path}: {failed.strerror or failed}") from failed
