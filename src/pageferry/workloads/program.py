"""Parts of `Migratable` that are the same for all arenas: memory of a program that has no virtual machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pageferry.memory.view import Memory
from pageferry.workloads.protocols import Migratable


class ProgramWorkload:
    """Workload of a Python program. It is paused only by pageferry, and a migration does not change its settings."""

    @property
    def live(self: Migratable) -> Migratable | None:
        """This workload, which can be saved while it runs."""
        return self

    @property
    def stays_paused(self) -> bool:
        """False: a program is not paused by its user."""
        return False

    @property
    def changes(self) -> dict[str, Any]:
        """Empty: a migration does not change the settings of a program."""
        return {}

    def open_memory(self: Migratable) -> Memory:
        """Map the memory. Raises WorkloadDied, WorkloadError."""
        return Memory(self)

    async def revert(self: Migratable, changes: Mapping[str, Any]) -> None:
        """Resume the workload: there are no changes to undo."""
        await self.resume()

    async def prepare_load(self) -> None:
        """Do nothing: a program has no callback for this."""

    async def prepare_commit(self) -> None:
        """Do nothing: only this program changes the workload."""

    async def prefault(self, units: Mapping[int, Sequence[int]] | None = None) -> int:
        """Do nothing and return 0: the threads of the workload use the page tables of their processes."""
        return 0
