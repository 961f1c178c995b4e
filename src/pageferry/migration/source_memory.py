"""Memory of a workload at the source of a migration: shared files, or the private pages of a clone."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from pageferry.memory.view import Memory
from pageferry.workloads.protocols import Migratable, clone_of

if TYPE_CHECKING:  # imported for clones only
    from pageferry.migration.clone_source import MovedClone

SourceMemory: TypeAlias = "Memory | MovedClone"


def open_memory(workload: Migratable) -> SourceMemory:
    """Open the memory of a workload. Raises WorkloadDied, WorkloadError, UnsupportedError."""
    record = clone_of(workload)
    if record is None:
        return Memory(workload)
    from pageferry.migration.clone_source import MovedClone

    return MovedClone(workload.name, record)
