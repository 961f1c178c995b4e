"""Record of a guest that waits for its state, and that another host may own.

A receiver or a restore starts QEMU, which waits for memory and device state. While the guest waits, the guardian of
that process has a plan that ends QEMU, or continues the guest if the decision of a migration is COMMITTED. If the
process is killed, another client can get the monitor before the guardian does. That client finds a paused guest with a
loaded state, as if the user had paused the guest. The record distinguishes the two cases, so that no client resumes a
guest that the source of a migration may be running.

The file is created before QEMU is started. It is removed after the guest has been resumed. A guardian that continues
the guest replaces the contents first.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from pageferry.host import files
from pageferry.host.guardian import WriteFile
from pageferry.host.registry import Folder

_FILE = "awaiting-state"
_WAITING, _RELEASED = "waiting", "released"
_MAX_LENGTH = 64
"""Maximum length of the contents, bytes."""


def begin(folder: Folder) -> None:
    """Record that the guest of this directory waits for its state. The record need not outlive a crash of the host,
    which ends the guest."""
    files.replace_file(_path(folder), _WAITING.encode())


def end(folder: Folder) -> None:
    """Remove the record, if there is one: the guest belongs to this host."""
    with contextlib.suppress(FileNotFoundError):
        _path(folder).unlink()


def waits(folder: Folder) -> bool:
    """Return whether the guest of this directory waits for its state, or waited when its controller was killed."""
    try:
        return files.read_regular(_path(folder), _MAX_LENGTH, follow=False) == _WAITING.encode()
    except FileNotFoundError:
        return False


def release(folder: Folder) -> WriteFile:
    """Return the action by which a guardian records that the guest belongs to this host."""
    return WriteFile(str(_path(folder).absolute()), _RELEASED)


def _path(folder: Folder) -> Path:
    return folder.path / _FILE
