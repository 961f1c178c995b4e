"""Opening and creation of files in directories in which other users may have planted files.

A reader first opens a file without side effects (O_PATH), checks its type, and opens it again through that descriptor.
A FIFO or a device in place of a file is never opened; the error states its type. A writer creates a new file, unnamed
or with a random hidden name and O_EXCL, and publishes it by rename or link. A symbolic link, a FIFO or a file of
another user at a predictable name is therefore neither followed nor written to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from pageferry.errors import UsageError

PRIVATE = 0o600
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
"""Errors of open(2) if O_TMPFILE is unsupported. The directory exists, which excludes other causes."""


class SpecialFile(OSError):
    """Error for a path that is not a regular file; `strerror` states its type."""

    def __init__(self, path: str | Path, mode: int) -> None:
        kind = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
        super().__init__(errno.EINVAL, f"it is {kind}, and not a regular file", str(path))


def open_regular(path: str | Path, flags: int = os.O_RDONLY, *, follow: bool = True) -> int:
    """Open an existing regular file; return the descriptor. The call never blocks, and never opens a FIFO or a device.

    `follow`: whether a symbolic link as the last component of the path is followed. Raises SpecialFile, OSError.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
    found = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        mode = os.fstat(found).st_mode
        if not stat.S_ISREG(mode):
            raise SpecialFile(path, mode)
        return os.open(f"/proc/self/fd/{found}", flags | os.O_CLOEXEC | os.O_NOCTTY)
    finally:
        os.close(found)


def read_regular(path: str | Path, limit: int, *, follow: bool = True) -> bytes:
    """Return the contents of a regular file. Raises SpecialFile, OSError (EFBIG if it is larger than `limit` bytes)."""
    with open(open_regular(path, follow=follow), "rb") as file:
        contents = file.read(limit + 1)
    if len(contents) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return contents


def open_private(path: str | Path, flags: int) -> int:
    """Open a file in a private directory (see `check_private`), and create it with mode 0600 if missing.

    Raises OSError.
    """
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, PRIVATE)


def create_new(path: str | Path) -> int:
    """Create a file that only this user can read, and open it for reading and writing. Raises FileExistsError for any
    existing entry, even a link. Also raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE)


def create_hidden(folder: Path, name: str) -> tuple[int, Path]:
    """Create a private file in a directory, with a random name that starts with `.name.`. Raises OSError."""
    path = folder / f".{name}.{os.urandom(4).hex()}"
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE), path


def unnamed_file(folder: Path) -> int:
    """Create a file without a name in a directory, and open it for reading and writing. Raises OSError."""
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, PRIVATE)
    except OSError as error:
        if error.errno not in _NO_UNNAMED_FILES:
            raise
    path = folder / f".unnamed.{os.urandom(8).hex()}"
    descriptor = create_new(path)
    path.unlink()
    return descriptor


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes to an open file, pipe or socket. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes to an open file at an offset, without changing its position. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def replace_file(path: Path, contents: bytes, *, mode: int = PRIVATE, synced: bool = False) -> None:
    """Replace a file atomically: readers see the old or the new contents. After OSError the old file is unchanged."""
    with new_file(path, mode=mode, synced=synced) as descriptor, open(os.dup(descriptor), "wb") as file:
        file.write(contents)


def create_log(path: Path) -> int:
    """Create a log that only its owner can read, and return its descriptor. A file of the same name is replaced.

    Raises SpecialFile if the path exists and is not a regular file, OSError (EPERM if the file belongs to another
    user).
    """
    with contextlib.suppress(FileNotFoundError):
        earlier = os.lstat(path)
        if not stat.S_ISREG(earlier.st_mode):
            raise SpecialFile(path, earlier.st_mode)
        if earlier.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "it belongs to another user", str(path))
    descriptor, temporary = create_hidden(path.parent, path.name)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
        temporary.rename(path)
    except BaseException:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
        raise
    return descriptor


@contextlib.contextmanager
def new_file(
    path: Path, *, mode: int = PRIVATE, synced: bool = True, linked: Callable[[], None] = lambda: None
) -> Iterator[int]:
    """Yield a descriptor of a file that is published as `path` when the block ends without an error.

    The file replaces an existing file of that name. Until then it is unnamed, so that nothing is left if the writer is
    killed. On file systems without O_TMPFILE, the file has a hidden name, and the next writer of `path` removes a
    left-over file. `synced`: whether the file is durable when the block has ended. `linked`: function that is called
    when the file has its hidden name. Raises OSError.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _remove_left_over(path.name, folder)
        descriptor, temporary = _unpublished(path.name, folder, mode)
        try:
            yield descriptor
            if synced:
                os.fsync(descriptor)
            _publish(descriptor, path.name, temporary, folder, linked)
            if synced:
                os.fsync(folder)
        except BaseException:
            if temporary is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
            raise
        finally:
            os.close(descriptor)
    finally:
        os.close(folder)


def _unpublished(name: str, folder: int, mode: int) -> tuple[int, str | None]:
    """Create a locked file, unnamed or with a hidden name. Return the descriptor and the name (None if unnamed).

    The lock shows other writers that this writer is still running.
    """
    while True:
        temporary = None
        try:
            descriptor = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, mode, dir_fd=folder)
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise
            temporary = f".{name}.{os.urandom(4).hex()}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, mode, dir_fd=folder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary is None or os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)  # another writer took the file for a left-over one and removed it before it was locked


def _publish(descriptor: int, name: str, temporary: str | None, folder: int, linked: Callable[[], None]) -> None:
    """Publish a file under its name. A link cannot replace a file, so an unnamed file gets a hidden name first."""
    if temporary is None:
        temporary = f".{name}.{os.urandom(4).hex()}"
        os.link(f"/proc/self/fd/{descriptor}", temporary, dst_dir_fd=folder, follow_symlinks=True)
        linked()
    try:
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise


def _remove_left_over(name: str, folder: int) -> None:
    """Remove hidden files whose writers have exited before they published the file as `name`."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}")
    for found in filter(pattern.fullmatch, os.listdir(folder)):
        with contextlib.suppress(OSError):  # already removed, or its writer runs
            descriptor = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(found, dir_fd=folder)
            finally:
                os.close(descriptor)


def check_private(folder: Path, remedy: str) -> None:
    """Reject a directory that other users own or can write to: they could plant sockets, records and links in it.

    `remedy`: advice to the user, for the error message. Raises UsageError, FileNotFoundError.
    """
    found = os.stat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"cannot use {folder}: it is not a directory; {remedy}")
    if found.st_uid != os.geteuid():
        raise UsageError(f"cannot use {folder}: it belongs to user {found.st_uid}, not {os.geteuid()}; {remedy}")
    if found.st_mode & 0o022:
        raise UsageError(f"cannot use {folder}: other users can write to it; chmod go-w it, or {remedy}")


@contextlib.contextmanager
def private_folder(path: Path) -> Iterator[int]:
    """Create a directory that only this user can list and write to, and that all users can search. Yield its
    descriptor. After the block, remove the directory and its files.

    If another user can write to the parent directory, that user can replace the directory, but not the entries of the
    directory to which the descriptor refers. Raises OSError.
    """
    path.mkdir(0o700)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(folder)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077 or os.listdir(folder):
            raise OSError(errno.EPERM, "another process has replaced it", str(path))
        os.fchmod(folder, 0o711)  # regardless of the umask
        try:
            yield folder
        finally:
            for name in os.listdir(folder):
                os.unlink(name, dir_fd=folder)
    finally:
        os.close(folder)
        with contextlib.suppress(OSError):
            path.rmdir()


def bind_private(listener: socket.socket, path: str) -> None:
    """Bind a socket with mode 0600 from the start. The umask is process-wide, so the mode is set before bind(2)."""
    os.fchmod(listener.fileno(), PRIVATE)
    listener.bind(path)
