"""Interface of all kinds of workloads: named memory regions, pause and resume, and state outside of the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pageferry.memory.regions import Identity, Region


@dataclass(frozen=True, slots=True)
class Faults:
    """Page faults of a workload's own threads since they started."""

    minor: int
    major: int


@dataclass(frozen=True, slots=True)
class Witness:
    """File that records the owner of a workload, for when the process that made the decision has exited."""

    path: Path
    says: str
    """Contents of the file if this host owns the workload. With other contents, or without the file, it does not."""


@runtime_checkable
class Workload(Protocol):
    """Running workload whose memory is managed by another process, or by code of its own process.

    Calls that change its state are coroutines: they send requests to another process, or run callbacks of the program.
    """

    name: str

    @property
    def identity(self) -> Identity:
        """Kind, name and details of the workload."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """Memory to be managed. Constant while the workload is open."""

    @property
    def handed_out(self) -> bool:
        """Whether a process may have received the memory, and closed it again, without being found by
        `check_mappers`.
        """

    async def check_mappers(self) -> None:
        """Check for processes, not named by `regions`, that can write to the memory.

        Raises WorkloadError if there is one, UnsupportedError if this user may not inspect the processes.
        """

    async def prepare_pause(self) -> None:
        """Do the part of `pause` that is possible while the workload runs. `resume` and `close` undo it."""

    async def does_direct_io(self) -> bool:
        """Return whether devices or the kernel may write to the regions through pinned pages. Raises as `drain`."""

    async def drain(self) -> float | None:
        """Wait until direct I/O that began before this call has completed. The workload runs afterwards, as before.

        Return the seconds for which it was paused; None if it does no direct I/O and was not paused. Raises
        WorkloadError if a request does not complete, UnsupportedError if a device keeps memory pinned. In both cases
        the workload is paused no longer than the request takes.
        """

    async def pause(self) -> None:
        """Stop all threads that can access the regions. Return when neither they nor any device can access them."""

    async def resume(self) -> None:
        """Resume the workload. Also called after a failed migration, when `save_state` has been called already.

        A WorkloadDied with `never_ran` guarantees that this call has not resumed the workload, and that it will never
        run.
        """

    async def save_state(self) -> bytes:
        """Return the state outside of the regions that is needed to run at the destination. The workload is paused."""

    async def commit(self, witness: Witness | None = None) -> None:
        """Commit the workload: it may run at the destination from now on. It stays paused until `resume` or `discard`,
        even if the process that paused it exits.

        Before this call, the workload continues if that process exits. At the destination a `witness` is given: if this
        process exits and the workload does not, the workload continues if the file assigns it to this host, and
        otherwise ends.
        """

    async def prepare_load(self) -> None:
        """Do the part of `load_state` that is possible before the state is received."""

    async def load_state(self, state: bytes) -> None:
        """Load a state that was returned by `save_state` on another host. The workload has not run on this host yet.

        Raises WorkloadError if the state does not match the workload.
        """

    async def prefault(self, units: Mapping[int, Sequence[int]] | None = None) -> int:
        """Populate the second-stage page tables (EPT, NPT) of a paused guest. Return the number of bytes mapped.

        The page tables of its process must be complete. `units`: 2 MiB units by number of region; None: all memory that
        is present. Raises OSError, WorkloadError; the workload can be resumed all the same.
        """

    async def discard(self) -> None:
        """End a workload that runs at the destination, or was received and never ran. Remove its files and records."""

    async def running(self) -> bool:
        """Return whether the workload runs; False if it is paused. Raises WorkloadDied if it has exited."""

    def faults(self) -> Faults:
        """Return the page faults of the workload's threads since their start, without those of pageferry's threads."""

    def close(self) -> None:
        """Close files and sockets. The workload itself is not changed."""


@runtime_checkable
class Revertible(Protocol):
    """Workload whose settings are changed for a migration, and are not restored when the process that changed them
    exits.

    After `commit` another process undoes the changes if the workload still belongs to the source.
    """

    @property
    def changes(self) -> dict[str, Any]:
        """Changes made so far, as data for the record of the commit."""

    async def revert(self, changes: Mapping[str, Any]) -> None:
        """Undo these changes of the committed workload, and resume it unless its user had paused it."""


def stays_paused(workload: object) -> bool:
    """Return whether `resume` leaves a workload paused, because its user had paused it. The result is valid from
    `prepare_pause` or `load_state` on, until `resume` is called.
    """
    return isinstance(workload, Revertible) and bool(workload.changes.get("paused"))
