"""Inventory of the bases of this host: memory that the clones of one image share."""

from __future__ import annotations

import os

from pageferry.errors import PageferryError
from pageferry.host.registry import Folder, Registry
from pageferry.pager import base_records
from pageferry.pager.base_protocol import BaseStatus
from pageferry.pager.base_records import BaseFolder, CloneRecord
from pageferry.pager.launcher import status_of_base
from pageferry.workloads.events import BaseInfo


def describe_bases(registry: Registry | None = None) -> list[BaseInfo]:
    """Return descriptions of all bases. Remove the records of bases that have neither a pager nor clones. Blocks."""
    registry = registry or Registry()
    found = (_describe(registry, folder) for folder in base_records.base_folders(registry))
    return [one for one in found if one is not None]


def deferred_of(folder: Folder, clone: CloneRecord) -> tuple[int, str | None]:
    """Return the number of bytes that the base of a clone lacks, and the reason why they are not loaded. Blocks."""
    status = _status(BaseFolder.of(folder.registry, clone.identity))
    if status is None:
        return 0, _advice(folder.name)
    return status.deferred, next(iter(status.failures), None)


def _describe(registry: Registry, folder: BaseFolder) -> BaseInfo | None:
    record = folder.load()
    if record is None:
        _remove_unused(folder)
        return None
    status = _status(folder)
    if status is not None:
        return BaseInfo(
            image=status.image,
            pager=status.pager,
            memory=status.length,
            resident=status.resident,
            deferred=status.deferred,
            clones=[one.name for one in status.clones],
            faults=[one.faults for one in status.clones],
            stall_reason=next(iter(status.failures), None),
        )
    clones = list(base_records.clones_of(registry, record.identity))
    if not clones:
        _remove_unused(folder)
        return None
    names = [one.name for one in clones]
    return BaseInfo(
        image=record.image, pager=None, memory=clones[0].record.length, clones=names, stall_reason=_advice(names[0])
    )


def _remove_unused(folder: BaseFolder) -> None:
    """Remove the directory that a killed pager has left, unless another pager has locked it."""
    lock = folder.lock()
    if lock is not None:
        folder.remove()
        os.close(lock)


def _status(folder: BaseFolder) -> BaseStatus | None:
    try:
        return status_of_base(folder)
    except (OSError, PageferryError):
        return None


def _advice(name: str) -> str:
    return f"the pager of the base has exited; `pageferry restore --takeover {name}` starts another pager"
