"""Request to a running hybrid migration to switch to post-copy: `pageferry migrate --switch NAME`.

While the source accepts the request, it keeps a record in the directory of the workload. The requesting process sets a
field of this record. The source polls the field between two chunks of a round.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from pageferry.errors import UsageError
from pageferry.host import proc
from pageferry.host.registry import Folder

RECORD = "switch.json"


class Switch(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a hybrid migration that is copying."""

    pid: int
    started: int
    """Start time of the migrating process, as returned by `proc.start_time`."""
    requested: bool = False


@contextmanager
def listening(folder: Folder) -> Iterator[None]:
    """Accept requests to switch over within the block. `requested` returns whether there was one."""
    started = proc.start_time(os.getpid())
    assert started is not None
    folder.store(RECORD, Switch(pid=os.getpid(), started=started))
    try:
        yield
    finally:
        folder.forget(RECORD)


def requested(folder: Folder) -> bool:
    """Return whether the switch-over was requested."""
    record = folder.load(RECORD, Switch)
    return record is not None and record.requested


def request(folder: Folder) -> None:
    """Request the switch-over. Raises UsageError if no migration accepts it."""
    record = folder.load(RECORD, Switch)
    if record is None or not proc.is_alive(record.pid, record.started):
        raise UsageError(
            f"cannot switch {folder.name} to post-copy: no migration with --mode hybrid is sending rounds of its memory"
        )
    folder.store(RECORD, msgspec.structs.replace(record, requested=True))
