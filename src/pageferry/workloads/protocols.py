"""What every kind of workload offers: named regions of memory, pause and resume, and a state that is not memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pageferry.memory.regions import Identity, Region


@dataclass(frozen=True, slots=True)
class Faults:
    """Page faults that a workload's own threads have taken so far."""

    minor: int
    major: int


@dataclass(frozen=True, slots=True)
class Witness:
    """A file that tells whose a workload is when whoever decided it cannot be asked any more."""

    path: Path
    says: str
    """Its contents once the workload is this host's. Anything else, or no file: it is not."""


@runtime_checkable
class Workload(Protocol):
    """A running workload whose memory is managed from outside of it.

    The calls that change its state are coroutines: they speak to another process, or run callbacks of the program.
    """

    name: str

    @property
    def identity(self) -> Identity:
        """What this workload is."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """The memory to be managed. Does not change while the workload is open."""

    @property
    def handed_out(self) -> bool:
        """Whether a process may have got the memory, and lost it again, without being found by `check_mappers`."""

    async def check_mappers(self) -> None:
        """Look for processes that can write to the memory and that `regions` does not name.

        Raises WorkloadError for one that is found, UnsupportedError where this user cannot look.
        """

    async def prepare_pause(self) -> None:
        """Do what can be done while it runs to make the pause that follows short. Undone by `resume` and `close`."""

    async def does_direct_io(self) -> bool:
        """Whether devices or the kernel may write to the regions through pages that they pin. Raises as `drain`."""

    async def drain(self) -> float | None:
        """Wait until direct I/O that has begun before this call has ended; the workload runs afterwards, as before.

        Return the seconds that it was paused for; None where there is no direct I/O and nothing was done. Raises
        WorkloadError where a request does not end, UnsupportedError where a device keeps memory pinned. Neither leaves
        the workload paused for longer than the request lasts.
        """

    async def pause(self) -> None:
        """Stop every thread that can touch the regions. Returns when none will touch them any more, nor any device."""

    async def resume(self) -> None:
        """Let the workload run. Also called after a failed migration, when `save_state` has been called already.

        WorkloadDied that says `never_ran` is a promise: it did not run by this call, and it never will.
        """

    async def save_state(self) -> bytes:
        """Everything that is not in the regions and is needed to run elsewhere. The workload is paused."""

    async def commit(self, witness: Witness | None = None) -> None:
        """It may run elsewhere from now on: it stays paused whoever dies, until `resume` or `discard` is called.

        Before this call, the death of whoever paused it lets it run on by itself. At the destination a `witness` is
        given: if we die, a workload that outlives us runs on where the witness says that it is ours, or else ends.
        """

    async def prepare_load(self) -> None:
        """Do what can be done before a state comes to make the `load_state` that follows short."""

    async def load_state(self, state: bytes) -> None:
        """Take the state that `save_state` gave on another host. The workload has not run here yet.

        Raises WorkloadError when the state does not fit.
        """

    async def prefault(self, units: Mapping[int, Sequence[int]] | None = None) -> int:
        """Map what stands between its memory and who runs in it, such as a hypervisor's tables; bytes mapped.

        It is paused, and its own page tables are as they shall be. `units`: 2 MiB units by number of region; None: all
        that is in memory. Raises OSError, WorkloadError: it may run all the same.
        """

    async def discard(self) -> None:
        """End the workload without a trace: it runs elsewhere now, or it never came to run here."""

    async def running(self) -> bool:
        """Whether it exists and runs (False: paused). Raises WorkloadDied when it is gone."""

    def faults(self) -> Faults:
        """Page faults of the workload's own threads since they started (not those of agents in the same process)."""

    def close(self) -> None:
        """Let go of files and sockets; the workload itself is left as it is."""


@runtime_checkable
class Revertible(Protocol):
    """A workload whose settings are changed for a migration, and not put back by the death of the process that did it.

    After `commit` another process undoes the changes, if the workload turns out to be still the source's.
    """

    @property
    def changes(self) -> dict[str, Any]:
        """What has been changed so far, as data for the record of the commit."""

    async def revert(self, changes: Mapping[str, Any]) -> None:
        """Make the committed workload as it was before these changes: running, or paused if its user had paused it."""


def stays_paused(workload: object) -> bool:
    """Whether `resume` leaves a workload paused, because its user had paused it. Known from `prepare_pause` or
    `load_state` on, until `resume` is called.
    """
    return isinstance(workload, Revertible) and bool(workload.changes.get("paused"))
