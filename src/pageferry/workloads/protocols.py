"""Interfaces of workloads that can be paused, saved to an image, or migrated.

`Saveable` extends `Pausable`, `Live` extends `Saveable`, and `Migratable` extends `Live`. QEMU guests, and arenas of
this or another process, are migratable. A VM of Cloud Hypervisor can be saved while it runs, and a process that
pageferry does not manage only while it is stopped. Calls that change the state of a workload
are coroutines: they send requests to another process, or run callbacks of the program.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from pageferry._engine import Pager
from pageferry.memory.regions import Identity, Placed, Region
from pageferry.memory.view import Extent, Readable

if TYPE_CHECKING:  # imported by the operations on clones
    from pageferry.pager.base_records import CloneRecord
    from pageferry.pager.launcher import PagerConnection
    from pageferry.pager.orders import BaseOpened

DISKS = "disks"
"""Detail of an identity: record of the disks of a guest (see `workloads.qemu.block_devices`)."""
SHARED = "disks-shared"
"""Detail with which the source of a migration asserts that both sides have the same disks."""
COPIED = "disks-copied"
"""Detail with which the source of a migration announces that it copies the disks that are not shared."""
BASE = "base"
"""Detail with which the source of a migration names the image whose memory the workload shares: `ID:DIGEST`."""
BASE_REQUIRED = "base-required"
"""Detail with which the source of a migration requires that the destination shares the memory of that image."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Page faults of a workload's own threads since they started."""

    minor: int
    major: int


@dataclass(frozen=True, slots=True)
class OwnershipRecord:
    """File that records the owner of a workload. A guardian reads it if the process that made the decision has
    exited."""

    path: Path
    contents: str
    """Contents of the file if this host owns the workload. If the file is missing or has other contents, this host does
    not own it."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Status of a workload, and the reason if it is paused."""

    status: str
    """`running`, `paused`, `committed` (the destination may own it) or `moved`."""
    reason: str | None = None
    """Reason why the workload is paused; None if it runs, or its user has paused it."""


@runtime_checkable
class Pausable(Protocol):
    """Workload whose threads can be stopped and continued."""

    @property
    def name(self) -> str:
        """Name of the workload on this host, or text that identifies it in error messages and logs."""

    @property
    def identity(self) -> Identity:
        """Kind, name and details of the workload."""

    @property
    def stays_paused(self) -> bool:
        """Whether `resume` leaves the workload paused, because its user had paused it. The value is valid from
        `prepare_pause` or `load_state` on, until `resume` is called.
        """

    async def prepare_pause(self) -> None:
        """Do the part of `pause` that is possible while the workload runs. `resume` and `close` undo it."""

    async def pause(self) -> None:
        """Stop all threads that can access the memory. Return when no thread and no device can access it."""

    async def resume(self) -> None:
        """Resume the workload. It is also called after a failed migration, in which `save_state` may have been called.

        A WorkloadDied with `never_ran` guarantees that this call has not resumed the workload, and that it will never
        run.
        """

    async def running(self) -> bool:
        """Return whether the workload runs; False if it is paused. Raises WorkloadDied if it has exited."""

    def faults(self) -> Faults:
        """Return the page faults of the workload's threads since their start, without those of pageferry's threads."""

    def close(self) -> None:
        """Close files and sockets. A workload that this process has paused and not committed is resumed."""


@runtime_checkable
class Saveable(Pausable, Protocol):
    """Workload whose memory and state can be saved to an image."""

    @property
    def regions(self) -> Sequence[Extent]:
        """Memory to be saved, constant while the workload is open."""

    @property
    def live(self) -> Live | None:
        """This workload, if it can be saved while it runs; None if it can only be saved while it is paused."""

    def open_memory(self) -> Readable:
        """Return the memory, for reading. Raises WorkloadDied, WorkloadError if it cannot be read."""

    async def save_state(self) -> bytes:
        """Return the state that is needed in addition to the memory to run the workload elsewhere. The workload must be
        paused."""


@runtime_checkable
class Live(Saveable, Protocol):
    """Workload that can be saved while it runs. Its memory consists of shared files."""

    @property
    def pid(self) -> int:
        """Process id of the virtual machine monitor, or of the program that owns the workload."""

    @property
    def registered(self) -> bool:
        """Whether the workload may be registered under its name on this host. Only registered names are unique."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """Memory to be managed, constant while the workload is open."""

    @property
    def pager(self) -> Pager | None:
        """Pager of this process that loads deferred contents; None if there is none, or if it belongs to another
        process."""

    @property
    def handed_out(self) -> bool:
        """Whether a process may have received the memory and closed it again. `check_mappers` cannot find such a
        process."""

    async def check_mappers(self) -> None:
        """Check that no process other than those in `regions` can write to the memory.

        Raises WorkloadError if there is one, UnsupportedError if this user cannot inspect the processes.
        """

    async def does_direct_io(self) -> bool:
        """Return whether devices or the kernel may write to the regions through pinned pages. Raises the same errors as
        `drain`."""

    async def drain(self) -> float | None:
        """Wait until direct I/O that began before this call has completed. A running workload continues to run
        afterwards.

        Return the time for which the workload was paused, seconds; None if it does no direct I/O and was not paused.
        Raises WorkloadError if a request does not complete; the workload may stay paused until the request completes.
        Raises UnsupportedError if a device keeps memory pinned.
        """


@runtime_checkable
class Migratable(Live, Protocol):
    """Workload that can be migrated to another process or host."""

    async def condition(self) -> Condition:
        """Return the status for display. Raises WorkloadDied if the workload has exited."""

    def check_migratable(self) -> None:
        """Raise UnsupportedError if the workload cannot leave this host, because another program manages it."""

    async def prepare_commit(self) -> None:
        """Do the part of `commit` that is possible while the destination loads the state."""

    async def commit(self, record: OwnershipRecord | None = None) -> None:
        """Commit the workload: it may run at the destination from now on. It stays paused until `resume` or `discard`,
        even if the process that paused it exits.

        Before this call, the workload continues if that process exits. The destination passes a `record`. If the
        process of the destination then exits and the workload survives, a guardian reads the file. It resumes the
        workload if the file assigns it to this host, and otherwise ends it.
        """

    @property
    def changes(self) -> dict[str, Any]:
        """Changes of settings made so far, for the record of the commit; empty if there are none.

        If the process that made the changes exits after `commit`, `revert` undoes them.
        """

    async def revert(self, changes: Mapping[str, Any]) -> None:
        """Undo these changes of the committed workload, and resume it unless its user had paused it."""

    async def prepare_load(self) -> None:
        """Do the part of `load_state` that is possible before the state is received."""

    async def load_state(self, state: bytes) -> None:
        """Load a state that was returned by `save_state` on another host. The workload has not run on this host yet.

        Raises WorkloadError if the state does not match the workload.
        """

    async def prefault(self, units: Mapping[int, Sequence[int]] | None = None) -> int:
        """Populate the second-stage page tables (EPT, NPT) of a paused guest. Return the number of bytes mapped.

        The page tables of its process must be complete. `units`: 2 MiB units by index of the region; None: all memory
        that is present. Raises OSError, WorkloadError; the workload can be resumed even after an error.
        """

    async def discard(self) -> None:
        """End a workload that runs at the destination, or was received and never ran. Remove its files and records."""


StateSink = Callable[[bytes], Awaitable[None]]
"""Function that receives the beginning of a state, in consecutive chunks."""


@runtime_checkable
class StateAhead(Protocol):
    """Workload whose state can be saved and loaded in part while it runs at the source, which shortens the pause."""

    async def pause_to_save(self, sink: StateSink) -> float:
        """Pause as `pause` does, but pass the beginning of the result of `save_state` to `sink` in advance. Return the
        time at which the workload stopped, on the clock of `time.perf_counter`."""

    async def load_ahead(self, chunk: bytes) -> None:
        """Load a chunk that was passed to the sink, before the memory is complete. `load_state` receives the whole
        state later."""


@dataclass(frozen=True, slots=True)
class SnapshotDetails:
    """Details of a workload as of its snapshot point, for an image."""

    details: dict[str, Any]
    """Details that replace those of `identity` with the same names."""
    warning: str | None = None
    """Warning for the user about state that the image does not contain; None if it contains all state."""


@runtime_checkable
class HasSnapshotDetails(Protocol):
    """Workload with details that change while it runs, such as the modification times of its disks."""

    async def update_details(self) -> None:
        """Update the details of `identity`. Raises WorkloadError."""

    async def note_details(self) -> None:
        """Record the details of the paused workload, for `snapshot_details`. Call this after `save_state`."""

    async def snapshot_details(self) -> SnapshotDetails:
        """Return the details that `note_details` has recorded. The workload may run again."""


@runtime_checkable
class Announcing(Protocol):
    """Workload with network addresses, which switches have to find again after it has moved."""

    async def announce(self) -> bool:
        """Announce the network addresses of the workload, which has been resumed. An announcement that is not possible
        raises no error. Return False if the workload does not respond now."""


async def announce(workload: Pausable) -> bool:
    """Announce the network addresses of a resumed workload, if it has any. Return False if the workload does not
    respond now."""
    return not isinstance(workload, Announcing) or await workload.announce()


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedDisk:
    """Disk whose contents were saved together with the memory of a guest."""

    id: str
    name: str
    path: str
    """File with the contents as of the snapshot point."""
    overlay: str | None = None
    """File to which the guest writes instead; None if the contents were copied."""


class DiskSaver(Protocol):
    """Object that saves the disks of a workload, for one attempt at a checkpoint."""

    @property
    def saved(self) -> tuple[SavedDisk, ...]:
        """Disks that `complete` has saved."""

    async def prepare(self) -> None:
        """Create and open all files while the workload runs, after `prepare_pause`."""

    async def flush(self) -> None:
        """Flush cached data of the disks, just before the pause."""

    async def freeze(self) -> None:
        """Freeze the disks of the paused workload, or start to copy them. Call this before `save_state`."""

    async def resumed(self) -> None:
        """Copy without a speed limit, because the pause has ended. If there is a bandwidth limit, only the memory uses
        it until `finish`."""

    async def finish(self, details: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Wait until the disks are saved, and return the details of `snapshot_details` with the saved disks. `progress`
        is called with the bytes done and the total. Raises WorkloadError."""

    async def abandon(self) -> None:
        """Undo all steps after a failure. The workload runs, unless its user had paused it."""


@runtime_checkable
class SavesDisks(Protocol):
    """Workload that has disks."""

    def save_disks(self, mode: str, folder: Path | None, image: Path, image_id: str, bandwidth: int = 0) -> DiskSaver:
        """Return the saver of the disks for an image. `mode`: `record`, `snapshot` or `copy`; `folder`: directory of
        new files, None for the default; `bandwidth`: limit for copies, bytes per second, 0 for none."""


@runtime_checkable
class CanBeClone(Protocol):
    """Workload that can share the memory of an image."""

    @property
    def clone(self) -> CloneRecord | None:
        """Record of the clone; None if the workload shares no memory."""


@runtime_checkable
class CanShareBase(Protocol):
    """Workload whose memory can be replaced by private pages over a base before it runs."""

    async def share_base(self, pager: PagerConnection, opened: BaseOpened, work: CloneRecord) -> None:
        """Replace the memory of this workload, which waits for its state, by private pages over an opened base. `work`:
        record of the clone; the pager adds the descriptors.

        Raises UnsupportedError for memory that cannot be replaced, RestoreError, CannotHandleFaults, WorkloadError.
        """


class Overlaid(NamedTuple):
    """Disk that is an overlay over a file that a checkpoint has frozen, or that was saved with an image."""

    name: str
    overlay: str
    """File to which the guest writes."""
    frozen: str


@runtime_checkable
class HasOverlays(Protocol):
    """Workload whose disks can be overlays."""

    async def overlays(self) -> list[Overlaid]:
        """Return the disks that are overlays over frozen files. Raises WorkloadError."""


def clone_of(workload: object) -> CloneRecord | None:
    """Return the record of a clone; None for any other workload."""
    return workload.clone if isinstance(workload, CanBeClone) else None


def placed_regions(workload: Live) -> Sequence[Placed]:
    """Return the regions of a workload with their mappings; for a clone, those of its record."""
    record = clone_of(workload)
    return workload.regions if record is None else record.regions


async def update_details(workload: Saveable) -> None:
    """Update the details of a workload that change while it runs. Raises WorkloadError."""
    if isinstance(workload, HasSnapshotDetails):
        await workload.update_details()


async def save_and_note(workload: Saveable) -> bytes:
    """Return the state of a paused workload, and record its details for `snapshot_details`."""
    state = await workload.save_state()
    if isinstance(workload, HasSnapshotDetails):
        await workload.note_details()
    return state


async def snapshot_details(workload: Saveable) -> SnapshotDetails:
    """Return the details of a workload as of its snapshot point, at which `save_and_note` was called."""
    return await workload.snapshot_details() if isinstance(workload, HasSnapshotDetails) else SnapshotDetails({})


async def _ignore(chunk: bytes) -> None:
    """Ignore the chunk: `save_state` will return it again."""


async def pause_to_save(workload: Saveable, sink: StateSink = _ignore) -> float:
    """Pause a workload whose state is saved next. `sink` receives the beginning of the state, if that is saved ahead.

    Return the time at which the workload stopped, on the clock of `time.perf_counter`.
    """
    if isinstance(workload, StateAhead):
        return await workload.pause_to_save(sink)
    started = time.perf_counter()
    await workload.pause()
    return started
