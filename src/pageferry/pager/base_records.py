"""Records of bases and clones: files that outlive all processes, so that a base can be found after its pager was
killed.

A base is an unnamed memory file with the contents of one image. Its clones map it, and QEMU keeps a read-only
descriptor of it. The kernel frees the memory when neither a mapping nor a descriptor is left, so no kill can leave a
base behind. The run directory contains::

    .bases/KEY/lock        locked by the pager of the base while it runs
    .bases/KEY/base.json   image and pager of the base: `BaseRecord`
    .bases/KEY/sock        socket for orders (`pager.orders`)
    .bases/KEY/pager.log   log of the pager
    .bases/KEY/programs/   clones in Python programs, which have no other directory: `CloneRecord`
    web/clone.json         clone of a base: `CloneRecord`, all that another pager needs to take over

The pager of a base removes its directory when the last clone has exited.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pageferry.errors import UsageError
from pageferry.host import files, proc
from pageferry.host.registry import CLONE_FILE, MAX_RECORD, MAX_SOCKET_PATH, Folder, Registry
from pageferry.images.metadata import ImageIdentity
from pageferry.pager.records import RegionRecord
from pageferry.stores.entry import version_of

BASES = ".bases"
MODE = 0o400
"""Mode of the file of a base: a QEMU that is not run by root cannot open it again for writing."""
_BASE, _LOCK, _SOCKET = "base.json", "lock", "sock"
_PROGRAMS = "programs"


class ImageStat(msgspec.Struct, frozen=True):
    """Identity and state of an image file, to find the base of an image without opening the image."""

    device: int
    inode: int
    length: int
    modified: int
    """Time of the last modification, nanoseconds. For a file of the cache, into which storage blocks are fetched, a
    number that is derived from the digest of its manifest."""


class BaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a base."""

    image: str
    """Path of the image."""
    identity: ImageIdentity
    stat: ImageStat
    pager: int
    """Process id of the pager."""


class CloneRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a clone: a guest, or memory of a Python program."""

    image: str
    """Path of the image when the clone was started."""
    identity: ImageIdentity
    pid: int
    regions: list[RegionRecord]
    descriptor: int = -1
    """Number of the read-only descriptor of the base in the process of the clone."""
    userfault: int = -1
    """Number of the userfaultfd in the process of the clone; -1 for a program whose page faults cannot be handled. Such
    a program maps the base only when all contents are loaded."""
    started: int = 0
    """Start time of the process of a program (`proc.start_time`). A guest has an entry in the registry instead."""
    device: int = -1
    """Device of the file of the base, as in `os.stat_result.st_dev`."""
    inode: int = -1
    """Inode of the file of the base. With `device`, it identifies the file: process ids and descriptor numbers are
    reused."""
    prefetch: bool = True
    eager: bool = False

    @property
    def length(self) -> int:
        """Size of the memory, bytes."""
        return sum(region.length for region in self.regions)


def image_stat(image: str | Path, descriptor: int | None = None) -> ImageStat:
    """Return the state of an image file. `descriptor`: descriptor of the file, if it is open: the path may lead to
    another file by now. Raises OSError."""
    found = os.stat(image if descriptor is None else descriptor)
    version = version_of(Path(os.path.realpath(image)))
    return ImageStat(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns if version is None else version)


def clone_record(folder: Folder) -> CloneRecord | None:
    """Return the record of a clone; None for a workload that is not a clone. Raises WorkloadError."""
    return folder.load(CLONE_FILE, CloneRecord)


@dataclass(frozen=True, slots=True)
class CloneFile:
    """Record of a clone, and its file."""

    name: str
    """Name of the guest, or `process-PID-N` for a program."""
    path: Path
    record: CloneRecord

    @property
    def exists(self) -> bool:
        """Whether the file exists. A program removes it when it frees its memory."""
        return self.path.exists()

    def store(self, record: CloneRecord) -> None:
        """Replace the record. It is not synced, because clones do not survive a crash of the host."""
        files.replace_file(self.path, msgspec.json.encode(record), synced=False)


def clones_of(registry: Registry, identity: ImageIdentity) -> Iterator[CloneFile]:
    """Yield the running clones of an image. Raises WorkloadError."""
    for name, entry in registry.entries().items():
        folder = Folder(registry, name)
        record = clone_record(folder)
        if record is not None and record.identity == identity and entry.alive and entry.pid == record.pid:
            yield CloneFile(name, folder.path / CLONE_FILE, record)
    for one in BaseFolder.of(registry, identity).programs():
        if one.record.identity == identity and proc.is_alive(one.record.pid, one.record.started):
            yield one


def find_program(registry: Registry, name: str) -> CloneFile | None:
    """Return the clone of this name in a running program; None if there is none."""
    clones = (one for folder in base_folders(registry) for one in folder.programs() if one.name == name)
    return next((one for one in clones if proc.is_alive(one.record.pid, one.record.started)), None)


class BaseFolder:
    """Directory of one base."""

    def __init__(self, registry: Registry, name: str) -> None:
        self._registry = registry
        self.path = registry.path / BASES / name

    @classmethod
    def of(cls, registry: Registry, identity: ImageIdentity) -> BaseFolder:
        """Return the directory of the base of an image. The directory may not exist. Its name is short, because the
        path of a socket is limited; `BaseRecord` has the complete identity."""
        return cls(registry, f"{identity.id[:8]}{identity.digest[:4]}")

    @property
    def socket(self) -> str:
        """Path of the socket for orders. Raises UsageError if it is longer than unix(7) allows."""
        path = str(self.path / _SOCKET)
        if len(path.encode()) > MAX_SOCKET_PATH:
            raise UsageError(
                f"invalid socket path {path}: longer than {MAX_SOCKET_PATH} bytes; use a shorter run directory "
                "(PAGEFERRY_RUN_DIR)"
            )
        return path

    def lock(self) -> int | None:
        """Create the directory and lock it. Return the descriptor of the lock, which the exit of the process releases;
        None if another pager holds the lock. Raises UsageError if other users can write to the run directory."""
        self._registry.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            with self._registry.locked():
                self.path.parent.mkdir(mode=0o700, exist_ok=True)
                self.path.mkdir(mode=0o700, exist_ok=True)
                descriptor = files.open_private(self.path / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path / _LOCK)):
                    return descriptor
            os.close(descriptor)  # the previous owner removed the directory before the lock was acquired

    def store(self, record: BaseRecord) -> None:
        """Store the record of the base."""
        files.replace_file(self.path / _BASE, msgspec.json.encode(record), synced=False)

    def load(self) -> BaseRecord | None:
        """Return the record of the base; None if there is no valid one."""
        try:
            return msgspec.json.decode(files.read_regular(self.path / _BASE, MAX_RECORD, follow=False), type=BaseRecord)
        except (OSError, msgspec.MsgspecError):
            return None

    def program(self, name: str) -> Path:
        """Return the path of the record of a clone in a program."""
        return self.path / _PROGRAMS / f"{name}.json"

    def add_program(self, name: str, record: CloneRecord) -> CloneFile:
        """Store the record of a clone in a program."""
        added = CloneFile(name, self.program(name), record)
        added.path.parent.mkdir(mode=0o700, exist_ok=True)
        added.store(record)
        return added

    def programs(self) -> Iterator[CloneFile]:
        """Yield the clones in programs, including programs that have exited."""
        for path in sorted((self.path / _PROGRAMS).glob("*.json")):
            with contextlib.suppress(OSError, msgspec.MsgspecError):  # removed since it was listed
                record = msgspec.json.decode(files.read_regular(path, MAX_RECORD, follow=False), type=CloneRecord)
                yield CloneFile(path.stem, path, record)

    def remove(self) -> None:
        """Remove the directory. The caller has locked it."""
        with self._registry.locked():
            shutil.rmtree(self.path, ignore_errors=True)


def base_folders(registry: Registry) -> list[BaseFolder]:
    """Return the directories of all bases, including those whose pager has exited."""
    try:
        return [BaseFolder(registry, name) for name in sorted(os.listdir(registry.path / BASES))]
    except FileNotFoundError:
        return []


def find_base(registry: Registry, image: str | Path) -> BaseFolder | None:
    """Return the directory of the base of an image file, found without opening the image; None if there is none."""
    try:
        wanted = image_stat(image)
    except OSError:
        return None
    for folder in base_folders(registry):
        record = folder.load()
        if record is not None and record.stat == wanted:
            return folder
    return None


def open_descriptor_of(pid: int, file: os.stat_result) -> int | None:
    """Find a descriptor of a file in a process. Return its number; None if there is none."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):  # closed since it was listed
            if os.path.samestat(os.stat(f"{folder}/{name}"), file):
                return int(name)
    return None


def reopen(pid: int, number: int, device: int, inode: int) -> int:
    """Open a base, which a process has open as descriptor `number`, for reading. Raises OSError, and FileNotFoundError
    if the descriptor refers to a file with another device or inode."""
    if proc.start_time(pid) is None:
        raise ProcessLookupError(f"cannot open descriptor {number} of process {pid}: the process has exited")
    found = _find(pid, number, device, inode)
    try:
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(found)


def _find(pid: int, number: int, device: int, inode: int) -> int:
    """Return a descriptor without access (O_PATH) of a base that a process has open. The file must be identified before
    it is opened, because process ids and descriptor numbers are reused. Raises OSError, FileNotFoundError for another
    file."""
    found = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
    file = os.fstat(found)
    if (file.st_dev, file.st_ino) != (device, inode):
        os.close(found)
        raise FileNotFoundError(errno.ENOENT, f"descriptor {number} of process {pid} refers to another file")
    return found


def reopen_base(record: CloneRecord) -> int:
    """Open the base that a clone has open, for reading and writing. Raises OSError, also if the descriptor of the clone
    refers to another file."""
    found = _find(record.pid, record.descriptor, record.device, record.inode)
    try:
        path = f"/proc/self/fd/{found}"
        try:
            os.chmod(path, MODE | 0o200)  # only root can open a file of mode 0400 for writing
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.chmod(path, MODE)
    finally:
        os.close(found)
