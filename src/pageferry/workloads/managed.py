"""Checks of workloads that are passed by callers."""

from __future__ import annotations

from pageferry.errors import UnsupportedError, WrongType
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.protocols import Migratable, Saveable


def saveable(workload: object) -> Arena | Saveable:
    """Return `workload` if it is an arena or another workload that can be saved. Raises WrongType."""
    if isinstance(workload, Arena):
        return workload
    if isinstance(workload, type) or not all(hasattr(workload, name) for name in ("identity", "regions", "live")):
        raise WrongType(f"invalid `workload` of type {type(workload).__name__}: expected an Arena")
    return workload  # type: ignore[return-value]  # by its methods


def managed(workload: object) -> Arena | Migratable:
    """Return `workload` if it is an arena or another workload that can be migrated. Raises WrongType,
    UnsupportedError.
    """
    found = saveable(workload)
    if isinstance(found, Arena):
        return found
    if found.live is None:
        raise UnsupportedError(f"cannot use {found.name}: it is a process, not a managed workload")
    return workload  # type: ignore[return-value]  # by its methods
