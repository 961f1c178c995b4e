"""Registry of the workloads of this host: name, process and control socket of each.

Every workload has a directory of its name in the run directory, with `workload.json`, its sockets, its log and its
durable records::

    /run/pageferry/             (or $XDG_RUNTIME_DIR/pageferry, or $PAGEFERRY_RUN_DIR)
    ├── .lock                   held while names are claimed, published, pruned or removed
    ├── .ended/web/             record and log of a workload that has ended (pageferry.host.endings)
    └── web/
        ├── workload.json       an `Entry`
        ├── migration.json      ownership of the workload (pageferry.migration)
        ├── clone.json          memory that is shared with other guests (pageferry.pager.base_records)
        ├── qmp.sock
        ├── tty.sock            serial port of a detached QEMU
        └── log                 output of a detached QEMU

A name is *claimed* by the process that is about to start the workload, and *published* when the workload exists. An
entry is valid while its process runs. Pid and start time identify the process, within one PID namespace and one boot.
The first command that finds that the process has exited removes the directory, and keeps the log. Entries of other PID
namespaces, whose state a command cannot determine, are left unchanged.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pageferry.errors import (
    NameInUse,
    NoSuchWorkload,
    UnsupportedError,
    UsageError,
    WorkloadDied,
    WorkloadError,
    WrongType,
)
from pageferry.host import endings, files, proc

VERSION = 1
"""Version of the entries; other versions are rejected."""

MAX_SOCKET_PATH = 107
"""Maximum length of a socket path, bytes: sun_path of unix(7) without the final NUL."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENTRY_FILE = "workload.json"
CLONE_FILE = "clone.json"
"""Record of a guest that shares the memory of its image."""
_REMEDY = "set PAGEFERRY_RUN_DIR to a directory that belongs to you"
MAX_RECORD = 64 << 20
"""Maximum size of a record, bytes."""
_STARTUP = 120.0
"""Maximum time between the creation of a socket by a program and its call of listen(2), seconds."""

Record = TypeVar("Record", bound=msgspec.Struct)


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Entry of a workload of any kind: the process that runs it."""

    pid: int
    started: int
    """`proc.start_time` of the process, to detect a reused pid."""
    boot: str = ""
    """`proc.boot_id` of the boot in which the process runs; empty in entries of older versions."""
    namespace: str = ""
    """`proc.namespace` to which `pid` and `started` refer; empty in entries of older versions."""
    version: int = VERSION

    @property
    def kind(self) -> str:
        """Kind of the workload, `qemu` or `arena`; `claim` before the workload exists."""
        return str(self.__struct_config__.tag)

    @property
    def alive(self) -> bool:
        """Whether the process is known to be running."""
        return self.liveness() is True

    @property
    def socket(self) -> str | None:
        """Path of the control socket of the workload; None if it has none."""
        return None

    def liveness(self) -> bool | None:
        """Return whether the process runs; None if this process cannot determine it."""
        if self.boot and self.boot != proc.boot_id():
            return False
        if self.namespace and self.namespace == proc.namespace():
            return proc.is_alive(self.pid, self.started)
        if not self.namespace and proc.is_alive(self.pid, self.started):
            return True
        # A socket refuses connections from any namespace once its last listener has exited.
        return False if self.socket is not None and _is_abandoned(self.socket) else None


def identify(pid: int) -> dict[str, Any]:
    """Return the fields of an `Entry` for a process. Raises WorkloadDied if it has exited, UnsupportedError
    if /proc belongs to another PID namespace."""
    namespace, started = proc.namespace(), proc.start_time(pid)
    if namespace is None:
        raise UnsupportedError(
            "cannot use /proc: it belongs to another PID namespace; mount proc(5) in the namespace of pageferry"
        )
    if started is None:
        raise WorkloadDied(f"process {pid} has exited")
    return {"pid": pid, "started": started, "boot": proc.boot_id(), "namespace": namespace}


class Claim(Entry, frozen=True, kw_only=True, tag="claim"):
    """Claim of a process on a name, until that process has started the workload and publishes its entry."""


class QemuEntry(Entry, frozen=True, kw_only=True, tag="qemu"):
    """QEMU guest."""

    qmp_socket: str
    adopted: bool = False
    """Whether another program started the guest and owns the socket."""
    domain: str | None = None
    """Name of the domain if libvirt manages the guest, otherwise None."""

    @property
    def socket(self) -> str | None:
        """Path of the QMP socket."""
        return self.qmp_socket


class ArenaEntry(Entry, frozen=True, kw_only=True, tag="arena"):
    """Python program that has an arena."""

    control_socket: str

    @property
    def socket(self) -> str | None:
        """Path of the arena's control socket."""
        return self.control_socket


AnyEntry = Claim | QemuEntry | ArenaEntry


@dataclass(frozen=True, slots=True)
class Folder:
    """Directory of one claimed name. The claiming process publishes an entry or releases the name."""

    registry: Registry
    name: str

    @property
    def path(self) -> Path:
        """Path of the directory."""
        return self.registry.path / self.name

    def socket_path(self, file_name: str) -> str:
        """Return the path of a socket of this workload. Raises UsageError if it is longer than unix(7) allows."""
        path = str(self.path / file_name)
        if len(path.encode()) > MAX_SOCKET_PATH:
            raise UsageError(
                f"invalid socket path {path}: longer than {MAX_SOCKET_PATH} bytes; use a shorter name, or a "
                "shorter run directory (PAGEFERRY_RUN_DIR)"
            )
        return path

    def publish(self, entry: AnyEntry) -> None:
        """Store the entry of the workload. It replaces the claim or an earlier entry."""
        with self.registry.locked():
            self.store(_ENTRY_FILE, entry)

    def release(self, record: endings.Ended | None = None) -> None:
        """Release the name, and remove the directory. With a `record`, keep the record and the log of the workload."""
        with self.registry.locked():
            self._remove(record)

    def _remove(self, record: endings.Ended | None) -> None:
        """Remove the directory. The caller holds the lock of the registry."""
        # Another command may already have found that the process has exited, and removed the directory.
        if record is not None and self.path.exists():
            endings.keep(self.registry.path, record, self.path)
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def exclusively(self, purpose: str, lock: str = "busy") -> Iterator[None]:
        """Exclude other exclusive operations (migrate, checkpoint) on the workload during the block. `lock`: name of
        the lock file; operations with different names do not exclude each other.

        Raises WorkloadError, naming the process and its purpose, if another operation is running.
        """
        with open(files.open_private(self.path / lock, os.O_RDWR | os.O_APPEND), "r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as busy:
                file.seek(0)
                raise WorkloadError(
                    f"cannot use {self.name}: {file.read() or purpose} is in progress; retry when that has finished"
                ) from busy
            file.truncate(0)
            file.write(f"{purpose} by process {os.getpid()}")
            file.flush()
            yield

    def store(self, file_name: str, record: msgspec.Struct, *, synced: bool = True) -> None:
        """Store a durable record of this workload: write it under a temporary name, sync it, and rename it.

        Without `synced`, the record outlives processes, but not a crash of the host. This is for records that are not
        needed after a crash.
        """
        files.replace_file(self.path / file_name, msgspec.json.encode(record), synced=synced)

    def load(self, file_name: str, kind: type[Record]) -> Record | None:
        """Return a durable record of this workload; None if it does not exist. Raises WorkloadError if it cannot be
        decoded."""
        path = self.path / file_name
        try:
            return msgspec.json.decode(files.read_regular(path, MAX_RECORD, follow=False), type=kind)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as wrong:
            raise _unreadable(path, wrong) from wrong

    def forget(self, file_name: str) -> None:
        """Remove a durable record, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / file_name).unlink()
            _sync_folder(self.path)


class Registry:
    """Registry in a run directory: that of this user, or a given one."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else default_run_directory()

    def claim(self, name: str) -> Folder:
        """Claim a name for a workload that this process is about to start.

        Raises UsageError if the name is invalid, NameInUse if a running workload or another claim has it.
        """
        check_name(name)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Folder(self, name)
        with self.locked():
            entry = self._read_living(folder)
            if entry is not None and entry.liveness() is None:
                raise NameInUse(_unknown(folder, "choose another name"))
            if entry is not None:
                doing = "is being started by" if isinstance(entry, Claim) else "is"
                raise NameInUse(
                    f"cannot use the name {name}: it {doing} process {entry.pid}; use another name, or run `pageferry "
                    f"stop {name}`"
                )
            endings.remove(self.path, name)
            folder.path.mkdir(mode=0o700)
            folder.store(_ENTRY_FILE, Claim(**identify(os.getpid())))
        return folder

    def lookup(self, name: str) -> AnyEntry:
        """Return the entry of the running workload of this name, or the claim on the name.

        Raises UsageError if the name is invalid, NoSuchWorkload, and WorkloadError if this process cannot determine
        whether the workload runs.
        """
        check_name(name)
        entry = None
        if self.path.is_dir():
            with self.locked():
                entry = self._read_living(Folder(self, name))
        if entry is None:
            raise NoSuchWorkload(_missing(self, name))
        if entry.liveness() is None:
            raise WorkloadError(_unknown(Folder(self, name), "run pageferry where it was started"))
        return entry

    def receiver_socket(self, name: str) -> str:
        """Return the default address of a receiver of a workload of this name.

        Raises UsageError if the name is invalid.
        """
        check_name(name)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return str(self.path / f".{name}.receive")

    def folder(self, name: str) -> Folder:
        """Return the directory of a registered workload, for its durable records. Raises the same errors as
        `lookup`."""
        self.lookup(name)
        return Folder(self, name)

    def entries(self) -> dict[str, AnyEntry]:
        """Return the entries of workloads that run, or may run (`Entry.liveness`), by name, without claims.

        Raises WorkloadError if an entry cannot be read.
        """
        if not self.path.is_dir():
            return {}
        names = sorted(entry.name for entry in self.path.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir())
        with self.locked():
            found = {name: self._read_living(Folder(self, name)) for name in names}
        return {name: entry for name, entry in found.items() if entry is not None and not isinstance(entry, Claim)}

    def remove(self, name: str, record: endings.Ended | None = None) -> None:
        """Remove the directory of a workload, whether the workload runs or not. Do nothing if there is none. With a
        `record`, keep the record and the log of the workload."""
        check_name(name)
        Folder(self, name).release(record)

    def remove_ended(self, name: str, entry: AnyEntry, record: endings.Ended) -> None:
        """Remove the directory as `remove` does, if the name still belongs to the process of `entry`, which has
        exited."""
        with self.locked():
            current = self._read_entry(Folder(self, name))
            if current is not None and (current.pid, current.started) == (entry.pid, entry.started):
                Folder(self, name)._remove(record)

    def ended_workloads(self) -> Sequence[endings.Ended]:
        """Return the records of workloads that have ended, in the order of their end."""
        self.entries()  # workloads that have ended since the last command
        return [one for one in endings.records(self.path) if not (self.path / one.name).exists()]

    def _read_living(self, folder: Folder) -> AnyEntry | None:
        """Return the entry of a workload that runs or may run; otherwise remove its directory and return None.

        The caller holds the lock.
        """
        entry = self._read_entry(folder)
        if entry is not None and entry.liveness() is not False:
            return entry
        folder._remove(_record_of(folder.name, entry))
        return None

    def _read_entry(self, folder: Folder) -> AnyEntry | None:
        """Return the entry in the directory of a workload; None if there is none."""
        try:
            written = files.read_regular(folder.path / _ENTRY_FILE, MAX_RECORD, follow=False)
            entry: AnyEntry | None = msgspec.json.decode(written, type=AnyEntry)
        except FileNotFoundError:
            entry = None
        except msgspec.MsgspecError as wrong:
            raise _unreadable(folder.path / _ENTRY_FILE, wrong) from wrong
        if entry is not None and entry.version != VERSION:
            raise WorkloadError(
                f"cannot read {folder.path / _ENTRY_FILE}: unsupported version {entry.version}, this pageferry "
                f"supports {VERSION}; use the version that has written it"
            )
        return entry

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run directory against all other pageferry processes. The lock is released when its process exits.

        Raises UsageError if other users own the run directory or can write to it.
        """
        try:
            files.check_private(self.path, _REMEDY)
            descriptor = files.open_private(self.path / ".lock", os.O_RDWR)
        except FileNotFoundError:  # without a run directory there is nothing to lock
            yield
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def default_run_directory() -> Path:
    """Return $PAGEFERRY_RUN_DIR, or else /run/pageferry as root, and $XDG_RUNTIME_DIR/pageferry otherwise.

    Raises UsageError if none of them can be determined.
    """
    if given := os.environ.get("PAGEFERRY_RUN_DIR"):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/run/pageferry")
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute():
        return runtime / "pageferry"
    raise UsageError(
        "cannot choose a run directory: XDG_RUNTIME_DIR is not an absolute path; set it, or set PAGEFERRY_RUN_DIR to a "
        "directory that belongs to you"
    )


def check_name(name: str) -> None:
    """Check the name of a workload. Raises UsageError if it is invalid, WrongType if it is not a string."""
    if not isinstance(name, str):
        raise WrongType(f"invalid `name` of type {type(name).__name__}: expected a string")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"invalid workload name {name!r}: expected 1 to 64 letters, digits, dots, underscores or hyphens, "
            "starting with a letter or digit"
        )


def _record_of(name: str, entry: AnyEntry | None) -> endings.Ended | None:
    """Return the record of a workload whose process is found to have exited; None if the workload never existed."""
    if entry is None or isinstance(entry, Claim):
        return None
    return endings.now(name, entry.kind, entry.pid, "exited", exact=False)


def _missing(registry: Registry, name: str) -> str:
    advice = "see `pageferry list`"
    if endings.find(registry.path, name) is not None:
        advice = f"it has ended, see `pageferry list --all` and `pageferry logs {name}`"
    return f"no workload named {name} in {registry.path}; {advice}"


def _unknown(folder: Folder, advice: str) -> str:
    return (
        f"cannot determine whether {folder.name} is running: it was started in another PID namespace, or by an older "
        f"pageferry; {advice}, or remove {folder.path} if it has exited"
    )


def _is_abandoned(path: str) -> bool:
    """Return whether a socket exists on which no process listens."""
    try:
        if time.time() - os.stat(path).st_mtime < _STARTUP:
            return False  # the owner has called bind(2), but not yet listen(2)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.setblocking(False)
            connection.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:  # the socket is busy, or is not in this mount namespace
        pass
    return False


def _unreadable(path: Path, wrong: Exception) -> WorkloadError:
    return WorkloadError(f"cannot read {path}: {wrong}; remove its directory if the workload has exited")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
