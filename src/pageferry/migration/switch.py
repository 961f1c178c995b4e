"""`pageferry migrate --switch NAME`: telling a hybrid migration that is under way to go over to post-copy now.

The source publishes in the workload's folder that it can be told so; whoever wants it says so in the same record, which
the source looks at between two portions of a round.
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
    """A hybrid migration that copies."""

    pid: int
    started: int
    """`proc.start_time` of the process that migrates."""
    requested: bool = False


@contextmanager
def listening(folder: Folder) -> Iterator[None]:
    """While this lasts the migration can be told to switch over: see `requested`."""
    started = proc.start_time(os.getpid())
    assert started is not None
    folder.store(RECORD, Switch(pid=os.getpid(), started=started))
    try:
        yield
    finally:
        folder.forget(RECORD)


def requested(folder: Folder) -> bool:
    """Whether somebody has asked for it."""
    record = folder.load(RECORD, Switch)
    return record is not None and record.requested


def request(folder: Folder) -> None:
    """Ask for it. Raises UsageError where nobody would hear that."""
    record = folder.load(RECORD, Switch)
    if record is None or not proc.is_alive(record.pid, record.started):
        raise UsageError(
            f"no migration of {folder.name} copies and can switch over: it is one of --mode hybrid that can be told to"
        )
    folder.store(RECORD, msgspec.structs.replace(record, requested=True))
