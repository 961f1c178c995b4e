"""Checks of workloads that callers pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pageferry.errors import UnsupportedError, WorkloadError, WrongType
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.handles import AttachedArena
from pageferry.workloads.protocols import Migratable, Saveable

if TYPE_CHECKING:
    from pageferry.workloads.arena.shared import SharedArena


class HasArena(Protocol):
    """Object whose contents are in an arena, such as `pageferry.Arrays`. Operations apply to the arena."""

    @property
    def arena(self) -> Arena | AttachedArena | SharedArena:
        """Arena with the contents."""


def saveable(workload: object) -> Arena | Saveable:
    """Return the arena of `workload` if it has one, otherwise `workload` itself.

    Raises WorkloadError for an attached arena, UnsupportedError for shared memory of an image, and WrongType for an
    object that cannot be saved.
    """
    arena = getattr(workload, "arena", workload)
    if isinstance(arena, Arena):
        return arena
    if isinstance(arena, AttachedArena):
        raise WorkloadError(
            f"cannot use {arena.name}: this process has only attached it; operations are possible in its owner, "
            f"process {arena.owner}"
        )
    if isinstance(workload, type) or not all(hasattr(workload, name) for name in ("identity", "open_memory", "live")):
        _refuse_shared(arena)
        raise WrongType(f"invalid `workload` of type {type(workload).__name__}: expected an Arena or Arrays")
    return workload  # type: ignore[return-value]  # by its methods


def _refuse_shared(arena: object) -> None:
    """Raise UnsupportedError for shared memory of an image."""
    from pageferry.workloads.arena.shared import SharedArena  # commands do not need it

    if isinstance(arena, SharedArena):
        raise UnsupportedError(
            f"cannot save or migrate the shared memory of {arena.image}: its changes are private to this process; use "
            'pageferry.dump, or restore the image with memory="own"'
        )


def managed(workload: object) -> Arena | Migratable:
    """Return the workload if it is an arena or another workload that can be migrated, or the arena of an object. Raises
    WrongType, UnsupportedError.
    """
    found = saveable(workload)
    if isinstance(found, Arena):
        return found
    if found.live is None:
        raise UnsupportedError(f"cannot use {found.name}: it is a process, not a managed workload")
    if not hasattr(found.live, "commit"):
        raise UnsupportedError(f"cannot use {found.name}: it is a workload that can only be saved")
    return workload  # type: ignore[return-value]  # by its methods
