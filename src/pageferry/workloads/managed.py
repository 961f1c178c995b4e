"""Checks of workloads that callers pass. They raise UsageError."""

from __future__ import annotations

from pageferry.errors import WrongType
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.protocols import Workload


def managed(workload: object) -> Arena | Workload:
    """Return `workload` if it is an arena, or a workload that can be migrated and saved."""
    if isinstance(workload, Arena):
        return workload
    if isinstance(workload, type) or not all(hasattr(workload, name) for name in ("identity", "regions", "resume")):
        raise WrongType(f"invalid `workload` of type {type(workload).__name__}: expected an Arena")
    return workload  # type: ignore[return-value]  # by its methods
