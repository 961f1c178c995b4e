"""Files and devices that back the disks of a QEMU guest, found among the open files of the QEMU process.

Paths may be renamed, replaced or deleted, and QEMU may run in another mount namespace. Therefore, a path only selects
one of the open files of QEMU (/proc/PID/fd), and all other information is read through this file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from pageferry.errors import WorkloadError
from pageferry.host import files, proc
from pageferry.workloads.qemu import qcow2
from pageferry.workloads.qemu.block_devices import File, Generation, Host, Layer

_CLOCK_REALTIME_COARSE = 5
"""Clock of the modification times that the kernel assigns, which advances by ticks of 1 to 10 ms (time.h)."""
_SETTLED = 50_000_000
"""Age, in nanoseconds, from which on a modification time assigned by a server counts as settled: later writes change
it."""

_SECOND = 1_000_000_000
_POLL = 0.01
"""Interval of checks whether a modification time is settled, seconds."""

_LOCAL = frozenset("bcachefs btrfs ext2 ext3 ext4 f2fs overlay ramfs tmpfs xfs".split())
"""File systems whose modification times are assigned by this kernel."""

_MAX_SERIAL = 256
"""Maximum number of bytes of a serial number in sysfs."""

_DELETED = " (deleted)"
_FDSET = re.compile(r"/dev/fdset/(\d+)")

_MAX_ENTRIES = 4 << 20
"""Maximum number of level-1 entries, as in QEMU."""
_EXAMINED = 1 << 20
"""Length of each end of a block device that is examined, bytes. Partition tables and superblocks are in these."""
_GET_LOCK = 36
"""F_OFD_GETLK of fcntl(2), for open file description locks."""
_LOCK = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, process."""
_LOCKS = (100, 200)
"""Start and number of the bytes that QEMU locks, one for each permission."""
_EXTERNAL_DATA = 4
"""Incompatible feature of a qcow2 file whose data are in another file."""


def host() -> Host:
    """Return the description of this host."""
    machine = b""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with suppress(OSError):
            machine = machine or Path(path).read_bytes().strip()
    return Host(boot=_digest(proc.boot_id().encode()), machine=_digest(machine) if machine else "")


def absolute(path: str, pid: int) -> str:
    """Return the absolute path of a file of a QEMU process, which resolves relative paths in its working directory.
    Raises WorkloadError if the process has exited."""
    if os.path.isabs(path):
        return path
    try:
        return os.path.join(os.readlink(f"/proc/{pid}/cwd"), path)
    except OSError as error:
        raise WorkloadError(f"cannot read the working directory of process {pid}: {error.strerror}") from error


def _digest(identifier: bytes) -> str:
    """Return a digest that identifies a host without disclosing its id."""
    return hashlib.blake2b(identifier, digest_size=16, person=b"pageferry disks").hexdigest()


class DiskFiles:
    """Files of the images of one guest. `find` returns an instance."""

    def __init__(self, pid: int, found: Mapping[str, tuple[str, File]], fdsets: Mapping[int, int]) -> None:
        self._pid = pid
        self._found = found
        self._fdsets = fdsets

    @classmethod
    def find(cls, pid: int, paths: Iterable[str], fdsets: Mapping[int, int]) -> DiskFiles:
        """Find the files at these paths among the open files of a QEMU process. `fdsets`: a descriptor of QEMU for each
        of its descriptor sets.

        Files that are not open, or that this user cannot inspect, are left out.
        """
        opened = _OpenFiles(pid)
        found = {}
        for path in paths:
            descriptor = opened.find(path, fdsets)
            if descriptor is not None:
                with suppress(OSError):  # closed since it was listed
                    file = opened.describe(descriptor)
                    found[path] = (opened.place(path, descriptor), file)
        return cls(pid, found, fdsets)

    def get(self, path: str) -> File | None:
        """Return the file of an image, without its generation; None if it was not found."""
        found = self._found.get(path)
        return found[1] if found is not None else None

    def place(self, path: str) -> str | None:
        """Return a path at which this process finds the file of an image; None if it was not found."""
        found = self._found.get(path)
        return found[0] if found is not None else None

    def generation(self, path: str) -> Generation | None:
        """Read the current state of a file. Return None for devices, and for files that QEMU has closed."""
        place, file = self._found.get(path, ("", None))
        if file is None or file.kind != "file":
            return None
        now = _stat(place)
        if now is None or not _is(now, file):
            # QEMU may have opened the image again by its path, with another descriptor.
            descriptor = _OpenFiles(self._pid).find(path, self._fdsets)
            now = _stat(_link(self._pid, descriptor)) if descriptor is not None else None
            if now is None or not _is(now, file):
                return None
        return Generation(size=now.st_size, modified=now.st_mtime_ns, settled=_is_settled(now.st_mtime_ns, file.fs))

    def is_empty_overlay(self, path: str) -> bool:
        """Return whether a file is a qcow2 image in which all clusters are those of its backing file."""
        return self._examine(path, _is_empty)

    def is_hole(self, path: str, start: int, length: int) -> bool:
        """Return whether a range of a file contains no data, so that it reads as zeros."""
        return self._examine(path, lambda opened: _is_hole(opened, start, length))

    def is_blank_device(self, path: str) -> bool:
        """Return whether the first and the last MiB of a block device contain only zeros, so that it has neither a
        partition table nor a file system."""
        place, file = self._found.get(path, ("", None))
        if file is None or file.kind != "device":
            return False
        with suppress(OSError):
            opened = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                return os.fstat(opened).st_rdev == file.device and _has_blank_ends(opened)
            finally:
                os.close(opened)
        return False

    def _examine(self, path: str, test: Callable[[int], bool]) -> bool:
        """Return the result of `test` for an open file; False if the file cannot be opened."""
        place, file = self._found.get(path, ("", None))
        if file is None or file.kind != "file":
            return False
        with suppress(OSError, struct.error):
            opened = files.open_regular(place)
            try:
                return _is(os.fstat(opened), file) and test(opened)
            finally:
                os.close(opened)
        return False


def _is_settled(modified: int, fs: str) -> bool:
    """Return whether a write from now on is certain to change a modification time."""
    now = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    if modified % _SECOND == 0:  # timestamps may have a granularity of one or two seconds
        return now - modified > 2 * _SECOND
    return now > modified if fs in _LOCAL else now - modified > _SETTLED


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _is(found: os.stat_result, file: File) -> bool:
    return (found.st_dev, found.st_ino) == (file.device, file.inode)


def _is_empty(file: int) -> bool:
    """Return whether the level-1 table of a qcow2 file contains only zeros."""
    header = qcow2.HEADER_BEGINNING.unpack(os.pread(file, qcow2.HEADER_BEGINNING.size, 0))
    magic, version, *_, features = header
    entries, offset = header[7:9]
    if magic != qcow2.MAGIC or version < 3 or features & _EXTERNAL_DATA or entries > _MAX_ENTRIES:
        return False
    table = os.pread(file, 8 * entries, offset)
    return len(table) == 8 * entries and not any(table)


def _is_hole(file: int, start: int, length: int) -> bool:
    try:
        return os.lseek(file, start, os.SEEK_DATA) >= start + length
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data up to the end of the file
            return True
        raise


def _has_blank_ends(device: int) -> bool:
    end = os.lseek(device, 0, os.SEEK_END)
    ends = (os.pread(device, _EXAMINED, 0), os.pread(device, _EXAMINED, max(end - _EXAMINED, 0)))
    return end > 0 and not any(one.strip(b"\0") for one in ends)


def layer_of(descriptor: int, path: Path, kind: str, size: int) -> Layer:
    """Return the description of an image that this process has open, and that is no longer written to. Wait until its
    modification time is settled. `size`: size of the disk, bytes. Raises OSError."""
    while True:
        found = os.fstat(descriptor)
        file = _OpenFiles(os.getpid()).describe(descriptor)
        if _is_settled(found.st_mtime_ns, file.fs):
            break
        time.sleep(_POLL)
    generation = Generation(size=found.st_size, modified=found.st_mtime_ns)
    return Layer(format=kind, path=str(path), size=size, driver="file", file=replace(file, generation=generation))


def is_unused_overlay(path: str) -> bool:
    """Return whether a file is a qcow2 overlay that contains no data and that no QEMU has open."""
    with suppress(OSError, struct.error):
        opened = files.open_regular(path, os.O_RDWR, follow=False)
        try:
            return _is_empty(opened) and not _is_locked(opened)
        finally:
            os.close(opened)
    return False


def is_locked(path: str) -> bool:
    """Return whether a QEMU process has a file open as an image, or whether this cannot be determined."""
    try:
        opened = files.open_regular(path, os.O_RDWR, follow=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return _is_locked(opened)
    finally:
        os.close(opened)


def _is_locked(file: int) -> bool:
    wanted = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCKS[0], _LOCKS[1], 0)
    return bool(_LOCK.unpack(fcntl.fcntl(file, _GET_LOCK, wanted))[0] != fcntl.F_UNLCK)


class _OpenFiles:
    """Open regular files and block devices of a process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._names: dict[str, int] = {}
        """Descriptors by path, as in /proc/PID/fd."""
        self._inodes: dict[tuple[int, int], int] = {}
        """Descriptors by device and inode."""
        with suppress(OSError):  # the process has exited, or cannot be inspected
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):  # closed since it was listed
                    self._add(int(entry.name), os.readlink(entry.path), os.stat(entry.path))

    def _add(self, descriptor: int, name: str, found: os.stat_result) -> None:
        if stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode):
            self._names.setdefault(name, descriptor)
            self._inodes.setdefault((found.st_dev, found.st_ino), descriptor)

    def find(self, path: str, fdsets: Mapping[int, int]) -> int | None:
        """Return a descriptor of the file at a path, which may be relative to the directory of the process."""
        if (passed := _FDSET.fullmatch(path)) is not None:
            return fdsets.get(int(passed[1]))
        for name in (self._absolute(path), self._absolute(path) + _DELETED):
            if name in self._names:
                return self._names[name]
        found = _stat(self._seen(path))
        return self._inodes.get((found.st_dev, found.st_ino)) if found is not None else None

    def place(self, path: str, descriptor: int) -> str:
        """Return a path at which this process can examine an open file: that of the image, because descriptors of QEMU
        change, or that of the descriptor if the image has been renamed or deleted."""
        named, opened = _stat(self._seen(path)), os.stat(_link(self._pid, descriptor))
        if named is not None and (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino):
            return self._seen(path)
        return _link(self._pid, descriptor)

    def _absolute(self, path: str) -> str:
        with suppress(OSError):
            path = os.path.join(os.readlink(f"/proc/{self._pid}/cwd"), path)
        return os.path.normpath(path)

    def _seen(self, path: str) -> str:
        """Return the path at which this process finds a file of the examined process."""
        return f"/proc/{self._pid}/root{self._absolute(path)}"

    def describe(self, descriptor: int) -> File:
        """Return the description of an open file. Raises OSError if it has been closed."""
        path = _link(self._pid, descriptor)
        found = os.stat(path)
        if stat.S_ISBLK(found.st_mode):
            return File(kind="device", device=found.st_rdev, serial=_serial(found.st_rdev))
        fs, source = _mount(self._pid, descriptor)
        return File(device=found.st_dev, inode=found.st_ino, fsid=_fsid(path), fs=fs, source=source)


def _link(pid: int, descriptor: int) -> str:
    return f"/proc/{pid}/fd/{descriptor}"


def _fsid(path: str) -> int:
    try:
        return os.statvfs(path).f_fsid
    except OSError:
        return 0


def _mount(pid: int, descriptor: int) -> tuple[str, str]:
    """Return type and source of the mount of an open file; empty strings if the mount is not visible."""
    with suppress(OSError):
        info = proc.lines(Path(f"/proc/{pid}/fdinfo/{descriptor}").read_bytes())
        number = next((line.split()[1] for line in info if line.startswith(b"mnt_id:")), b"")
        for line in proc.lines(Path(f"/proc/{pid}/mountinfo").read_bytes()):
            fields, _, more = line.partition(b" - ")
            if fields.split(b" ", 1)[0] == number:
                kind, source, *_ = more.split(b" ")
                return proc.printable(kind), proc.printable(source)
    return "", ""


def _serial(device: int) -> str:
    """Return the world-wide name of a block device, or the UUID of a device-mapper device; empty if it has none."""
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for name in ("dm/uuid", "wwid", "device/wwid"):
        with suppress(OSError):
            text = proc.printable((folder / name).read_bytes()[:_MAX_SERIAL].strip())
            if text:
                return text
    return ""
