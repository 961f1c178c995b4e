"""Records and logs of workloads that have ended, until a workload of the same name starts.

::

    /run/pageferry/.ended/web/
    ├── ended.json      an `Ended`
    └── log             end of QEMU's log, if it had one

Records are a help for the user, and no operation depends on them. They are written when a pageferry command ends a
workload, or finds that the process of a workload has exited. An error in writing them, such as a full file system, is
ignored.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from pageferry.host import files

LOG = "log"
"""File name of the output of a detached QEMU, in the directory of its workload and in that of its record."""

MAX_RECORDS = 16
"""Maximum number of ended workloads. The oldest records are removed."""
MAX_LOG = 1 << 20
"""Maximum length of a log that is kept, bytes. Of a longer log, the end is kept."""
VERSION = 1

Cause = Literal["exited", "stopped", "migrated"]
_FOLDER, _FILE = ".ended", "ended.json"
_MAX_RECORD = 64 << 10


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a workload that has ended."""

    version: int = VERSION
    name: str
    kind: str
    """Kind of the workload, `qemu` or `arena`."""
    pid: int
    cause: Cause
    """`exited`: the process has exited or was killed; `stopped`: a command of pageferry has ended it;
    `migrated`: it was ended after its migration to another host."""
    exact: bool
    """Whether the process exited at `time`. If False, it had exited at an unknown earlier time."""
    time: float
    """Seconds since 1970."""
    code: int | None = None
    """Exit code of the process, -N after signal N; None if unknown, because the process was not a child of
    pageferry."""


def keep(run_directory: Path, record: Ended, files_of: Path) -> None:
    """Store the record of an ended workload, and move its log from the directory `files_of`. An older record of the
    same name is replaced. The caller holds the lock of the run directory."""
    target = _path(run_directory, record.name)
    with contextlib.suppress(OSError):
        remove(run_directory, record.name)
        target.mkdir(mode=0o700, parents=True)
        _move_end(files_of / LOG, target / LOG)
        files.replace_file(target / _FILE, msgspec.json.encode(record))
        _remove_oldest(run_directory)


def remove(run_directory: Path, name: str) -> bool:
    """Remove the record and the log of an ended workload. Return whether there was a record."""
    folder = _path(run_directory, name)
    existed = folder.exists()
    shutil.rmtree(folder, ignore_errors=True)
    return existed


def find(run_directory: Path, name: str) -> Ended | None:
    """Return the record of the ended workload of this name; None if there is none, or if it cannot be read."""
    try:
        written = files.read_regular(_path(run_directory, name) / _FILE, _MAX_RECORD, follow=False)
        return msgspec.json.decode(written, type=Ended)
    except (OSError, msgspec.MsgspecError):
        return None


def log_path(run_directory: Path, name: str) -> Path:
    """Return the path of the log of the ended workload of this name. The file may not exist."""
    return _path(run_directory, name) / LOG


def tail(log: Path, length: int = 2000) -> bytes:
    """Return the last `length` bytes of a log; empty if there is none."""
    try:
        with open(files.open_regular(log, follow=False), "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - length, 0))
            return file.read(length)
    except OSError:
        return b""


def records(run_directory: Path) -> Sequence[Ended]:
    """Return the records of all ended workloads, in the order of their end."""
    try:
        names = os.listdir(run_directory / _FOLDER)
    except OSError:
        return []
    found = [record for name in names if (record := find(run_directory, name)) is not None]
    return sorted(found, key=lambda record: (record.time, record.name))


def now(name: str, kind: str, pid: int, cause: Cause, *, exact: bool, code: int | None = None) -> Ended:
    """Return the record of a workload whose end has just been noticed."""
    return Ended(name=name, kind=kind, pid=pid, cause=cause, exact=exact, time=time.time(), code=code)


def _path(run_directory: Path, name: str) -> Path:
    return run_directory / _FOLDER / name


def _move_end(source: Path, target: Path) -> None:
    """Move a file, or only its end if it is longer than `MAX_LOG`."""
    with contextlib.suppress(FileNotFoundError):
        if source.stat().st_size <= MAX_LOG:
            source.rename(target)
            return
        with open(files.open_regular(source, follow=False), "rb") as file:
            file.seek(-MAX_LOG, os.SEEK_END)
            files.replace_file(target, file.read(MAX_LOG))


def _remove_oldest(run_directory: Path) -> None:
    for record in records(run_directory)[:-MAX_RECORDS]:
        remove(run_directory, record.name)
