"""Frozen files: disks and copies of disks whose contents are those of a snapshot point, and which must not change.

A record beside each frozen file, `FILE.frozen`, names the images and overlays that need the file. While one of them
exists, the file has no write permission, and pageferry starts no guest that would write to it. QEMU itself does not
check this, and root ignores the permission.

The record is written before a disk is frozen, so that it names files that a killed command has left. The record is
changed under a lock (flock(2)) of a separate file, which only its owner can open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

from pageferry.errors import ImageError, UsageError, WorkloadError
from pageferry.host import files
from pageferry.images.image import open_link

VERSION = 1
SUFFIX = ".frozen"
"""Suffix of the name of a record."""
_LOCK = ".lock"
"""Suffix that is added to the name of a record for the lock of the record."""
_LOCK_TIMEOUT = 10.0
"""Maximum time to wait for the lock, seconds."""
_POLL = 0.02
"""Interval of attempts to get the lock, seconds."""
_MAX_RECORD = 1 << 20
"""Maximum size of a record, bytes."""
_READABLE = 0o644
_WRITE = 0o222


class Need(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Image or overlay that needs the contents of a frozen file."""

    kind: Literal["image", "overlay"]
    path: str
    """Absolute path."""
    id: str = ""
    """Identifier of an image."""
    prepared: bool = False
    """Whether a checkpoint has created the overlay. If the checkpoint was killed, the overlay may never have been
    used."""
    folder: int = 0
    """Inode number of the directory; 0 if unknown. Another directory at the path shows that a file system is not
    mounted."""

    @property
    def key(self) -> tuple[str, str]:
        """Path and identifier. A later image at the same path has another identifier."""
        return self.path, self.id

    @property
    def exists(self) -> bool:
        """Whether the image or the overlay still exists. An image that has been renamed counts as removed. If this
        cannot be determined, the image or the overlay counts as existing."""
        try:
            if self.kind == "overlay":
                return stat.S_ISREG(os.stat(self.path).st_mode)
            return open_link(Path(self.path)).image.id.hex() == self.id
        except (OSError, ImageError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            return bool(self.doubt) or (isinstance(cause, OSError) and cause.errno == errno.EIO)

    @property
    def doubt(self) -> str:
        """Reason why it cannot be determined whether the image or the overlay exists; empty if it can be determined."""
        try:
            os.stat(self.path)
            if self.kind == "image":
                os.close(files.open_regular(self.path))
        except files.SpecialFile:
            return ""
        except FileNotFoundError:
            try:
                same = self.folder in (0, os.stat(os.path.dirname(self.path)).st_ino)
            except OSError as error:
                return f"{os.path.dirname(self.path)}: {error.strerror}"
            return "" if same else "another directory is at this path, perhaps because a file system is not mounted"
        except OSError as error:
            return str(error.strerror)
        return ""

    def __str__(self) -> str:
        """Return the words that name the image or the overlay in error messages."""
        return f"{self.kind} {self.path}" + (f" (it may exist: {doubt})" if (doubt := self.doubt) else "")


class Frozen(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a frozen file."""

    version: int = VERSION
    inode: int
    """Inode number of the file. A file that has replaced it is not frozen."""
    mode: int
    """Permissions of the file before it was frozen."""
    needs: tuple[Need, ...] = ()

    @property
    def existing(self) -> list[Need]:
        """Images and overlays that still exist."""
        return [need for need in self.needs if need.exists]


def record_path(path: Path) -> Path:
    """Return the path of the record of a file."""
    return path.with_name(path.name + SUFFIX)


def find(path: str | Path) -> Frozen | None:
    """Return the record of a file, found through symbolic links too; None if the file was not frozen.

    Raises WorkloadError if the record cannot be read. A record that belongs neither to root nor to this user is
    ignored.
    """
    real = Path(os.path.realpath(path))
    try:
        inode, record = os.stat(real).st_ino, os.lstat(record_path(real))
        if record.st_uid not in (0, os.geteuid()) or not stat.S_ISREG(record.st_mode):
            return None
        written = files.read_regular(record_path(real), _MAX_RECORD, follow=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # no record can exist
            return None
        raise WorkloadError(
            f"cannot determine whether {real} is frozen: {record_path(real)}: {error.strerror}"
        ) from error
    try:
        found = msgspec.json.decode(written, type=Frozen)
    except msgspec.MsgspecError as wrong:
        raise WorkloadError(
            f"cannot read {record_path(real)}: {wrong}; remove the record if no image and no overlay needs {real.name}"
        ) from wrong
    if found.version != VERSION:
        raise WorkloadError(
            f"cannot read {record_path(real)}: unsupported version {found.version}; use a newer release"
        )
    return found if found.inode == inode else None


def require(path: str | Path, *needs: Need) -> None:
    """Record that images or overlays need the contents of a file. Raises WorkloadError."""
    real = Path(os.path.realpath(path))
    try:
        with _locked(real) as status:
            found = find(real) or Frozen(inode=status.st_ino, mode=stat.S_IMODE(status.st_mode))
            new = [replace(need, folder=os.stat(os.path.dirname(need.path)).st_ino) for need in needs]
            kept = [need for need in found.needs if need.key not in {one.key for one in new}]
            _store(real, replace(found, needs=(*kept, *new)))
    except OSError as error:
        raise WorkloadError(
            f"cannot freeze {real}: cannot write {record_path(real)}: {error.strerror}; allow pageferry to create "
            f"files in {real.parent}, or move the file"
        ) from error


def release(path: str | Path, *needs: Need) -> None:
    """Record that images or overlays no longer need the contents of a file. Without any other need, the file becomes
    writable again. Raises OSError, WorkloadError."""
    real, released = Path(os.path.realpath(path)), {need.key for need in needs}
    if find(real) is None:  # checked without a lock: its file cannot be created in every directory
        return
    with contextlib.suppress(FileNotFoundError), _locked(real):
        if (found := find(real)) is not None:
            _update(real, replace(found, needs=tuple(need for need in found.needs if need.key not in released)))


def seal(path: str | Path) -> None:
    """Remove the write permissions of a file that has a record. Raises OSError, WorkloadError."""
    if (found := find(path)) is not None:
        _change_mode(Path(os.path.realpath(path)), found.inode, lambda mode: mode & ~_WRITE)


def unseal(path: str | Path) -> None:
    """Restore the permissions of a file before it was frozen, and keep its record. Raises OSError, WorkloadError."""
    if (found := find(path)) is not None:
        _change_mode(Path(os.path.realpath(path)), found.inode, lambda _: found.mode)


def thaw(path: str | Path) -> None:
    """Make a file writable again, and remove its record. Raises OSError, WorkloadError."""
    real = Path(os.path.realpath(path))
    with _locked(real):
        if (found := find(real)) is not None:
            _update(real, replace(found, needs=()))


def check_writable(path: str | Path, name: str) -> None:
    """Raise UsageError if the guest `name` would write to a frozen file. A file that is no longer needed becomes
    writable again."""
    if (found := find(path)) is None:
        return
    if not (existing := found.existing):
        with contextlib.suppress(OSError):  # the file belongs to another user: QEMU reports the missing permission
            thaw(path)
        return
    unsure = any(need.doubt for need in existing)
    raise UsageError(
        f"cannot start {name}: it would write to {path}, which is frozen: {', '.join(map(str, existing))} need"
        f"{'s' if len(existing) == 1 else ''} its contents; attach the overlay instead of this file, write the "
        "overlay back with `pageferry disks commit` while its guest runs, or remove the images and overlays that need "
        "the file"
        + (f"; mount the file system, or remove {record_path(Path(os.path.realpath(path)))} if they are gone" * unsure)
    )


def _update(real: Path, found: Frozen) -> None:
    """Store a record; without needs, remove it and restore the permissions of the file."""
    if found.needs:
        _store(real, found)
        return
    _change_mode(real, found.inode, lambda _: found.mode)
    record_path(real).unlink()


def _change_mode(real: Path, inode: int, changed: Callable[[int], int]) -> None:
    """Change the permissions of a file, unless another file has replaced it."""
    descriptor = files.open_regular(real, follow=False)
    try:
        if (status := os.fstat(descriptor)).st_ino == inode:
            os.fchmod(descriptor, changed(stat.S_IMODE(status.st_mode)))
    finally:
        os.close(descriptor)


def _store(real: Path, found: Frozen) -> None:
    files.replace_file(record_path(real), msgspec.json.encode(found), mode=_READABLE, synced=True)


@contextlib.contextmanager
def _locked(real: Path) -> Iterator[os.stat_result]:
    """Lock the record of a file. Yield the status of the file. Raises OSError, WorkloadError."""
    lock = real.with_name(real.name + SUFFIX + _LOCK)
    descriptor = _lock(lock, time.monotonic() + _LOCK_TIMEOUT)
    try:
        status = os.lstat(real)
        if not stat.S_ISREG(status.st_mode):
            raise files.SpecialFile(real, status.st_mode)
        yield status
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(lock: Path, deadline: float) -> int:
    """Create and lock a file. Return its descriptor. The owner of the lock removes the file."""
    while True:
        descriptor = files.open_private(lock, os.O_RDWR)
        try:
            status = os.fstat(descriptor)
            if status.st_uid not in (0, os.geteuid()) or not stat.S_ISREG(status.st_mode):
                raise WorkloadError(f"cannot lock {lock}: it is not a regular file of this user; remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # otherwise its owner has removed it
                return os.dup(descriptor)
        except BlockingIOError as locked:
            if time.monotonic() > deadline:
                raise WorkloadError(
                    f"cannot lock {lock} within {_LOCK_TIMEOUT:g} s: another pageferry changes the record; retry"
                ) from locked
        finally:
            os.close(descriptor)
        time.sleep(_POLL)
