"""Disks of a QEMU guest: comparison with those of a source or an image, copies to a destination, and saving with an
image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.workloads.protocols import COPIED, DISKS, SHARED, Overlaid, SnapshotDetails
from pageferry.workloads.qemu import block_devices, disk_comparison
from pageferry.workloads.qemu.block_devices import BlockDevice
from pageferry.workloads.qemu.control import QemuControl
from pageferry.workloads.qemu.run_state import LastSeen
from pageferry.workloads.qemu.storage import Storage

if TYPE_CHECKING:  # imported by the methods that use them: most commands do not
    from pageferry.workloads.qemu.block_jobs import Progress
    from pageferry.workloads.qemu.disk_committing import Committed
    from pageferry.workloads.qemu.disk_exports import QemuExports
    from pageferry.workloads.qemu.disk_mirrors import QemuMirrors
    from pageferry.workloads.qemu.disk_saving import DiskSaving, SavingGuest


class GuestDisks(ABC):
    """Disks of a guest. Base class of `QemuWorkload`."""

    name: str
    _control: QemuControl
    _seen: LastSeen

    def __init__(self, pid: int) -> None:
        self._storage = Storage(pid)
        self._copied: tuple[int, ...] = ()
        """Indexes of the disks that the accepted source copies."""
        self._last_saving: DiskSaving | None = None
        """Object that saves the disks for the last checkpoint; None if there was no checkpoint."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """Process id of QEMU."""

    @property
    @abstractmethod
    def qmp_socket(self) -> str:
        """Path of the monitor."""

    @property
    @abstractmethod
    def stays_paused(self) -> bool:
        """Whether `resume` leaves the guest paused."""

    @abstractmethod
    async def resume(self) -> None:
        """Undo `prepare_pause`, and run the guest unless it stays paused."""

    # -- record and comparison

    async def update_details(self) -> None:
        """Query the block devices, and find their files. Raises WorkloadError, WorkloadDied."""
        if self._seen.machine.block_devices == ():
            return
        async with self._control.session() as monitor:
            await self._seen.update_media(monitor)
            await self._storage.locate(monitor, self._seen.machine)

    def _check_source_disks(self, details: Mapping[str, Any], here: str) -> None:
        """Raise WorkloadError unless the disks are those of a source, or can be copies of them. `here`: name of this
        guest, for error messages."""
        theirs, shared = block_devices.decode(details), details.get(SHARED) is True
        ours = self._storage.record(self._seen.machine.block_devices or ())
        if details.get(COPIED) is True:
            from pageferry.workloads.qemu import disk_choice

            self._copied = disk_choice.choose(theirs, ours, here, self._storage, shared=shared)
        else:
            disk_comparison.check_migration(theirs, ours, here, shared=shared)

    def _check_image_disks(self, details: Mapping[str, Any], path: str, *, as_is: bool) -> None:
        """Raise DisksDiffer unless the disks are those of an image. `as_is`: accept any contents."""
        devices, recorded = self._seen.machine.block_devices or (), block_devices.decode(details)
        record = self._storage.record_now(devices)
        if recorded is not None:
            recorded = recorded.as_saved
            empty = self._storage.empty_overlays(devices)
            record = disk_comparison.without_overlays(record, empty, recorded)
        disk_comparison.check_restore(recorded, record, path, self.name, as_is=as_is)

    async def note_details(self) -> None:
        """Record the state of the files of all disks, for `snapshot_details`. Call this after `save_state`, which may
        write to these files.

        If the guest stays paused, the files are examined only when later writes are certain to be detected.
        """
        await self._storage.note(self._seen.machine.block_devices or (), at_rest=self.stays_paused)

    async def snapshot_details(self) -> SnapshotDetails:
        """Return the record of the disks as of `note_details`, which sends no query, to keep the pause short.

        If another client has changed disks or media since the last query before the pause, the record states that
        the contents of all disks are unknown. Raises WorkloadDied.
        """
        if (noted := self._storage.noted) is None:
            return SnapshotDetails({})
        try:
            await self.update_details()
        except WorkloadDied:
            raise
        except WorkloadError as failed:
            return SnapshotDetails({}, f"the image does not describe the contents of disks: {failed}")
        devices, saving = self._seen.machine.block_devices or (), self._disk_saving
        if (devices if saving is None else saving.before(devices)) != noted.devices:
            return SnapshotDetails({}, disk_comparison.CHANGED)
        with_disks = saving is not None and saving.is_complete_record
        warning = None if with_disks else disk_comparison.unsaved(noted.record)
        return SnapshotDetails({DISKS: block_devices.encode(noted.record)}, warning)

    # -- copies to the destination of a migration

    def disk_exports(self) -> QemuExports:
        """Return the exports of the disks that the source accepted by `check_source` copies."""
        from pageferry.workloads.qemu.disk_exports import QemuExports

        devices = self._media(self._copied)
        return QemuExports(self.name, self._control, devices, self._storage.places(tuple(devices.values())))

    def disk_mirrors(self, numbers: Sequence[int], buffer: int) -> QemuMirrors:
        """Return the copies of the disks with these numbers. `buffer`: maximum number of bytes in flight per disk.
        Raises WorkloadError if there is no such disk."""
        from pageferry.workloads.qemu.disk_mirrors import QemuMirrors

        return QemuMirrors(self._control, self.pid, self._media(numbers), buffer)

    def _media(self, numbers: Sequence[int]) -> dict[int, BlockDevice]:
        media = self._storage.record(self._seen.machine.block_devices or ()).media
        if unknown := [number for number in numbers if number >= len(media)]:
            raise WorkloadError(f"cannot copy disk {unknown[0]} of {self.name}: it has only {len(media)} disks")
        return {number: media[number] for number in numbers}

    # -- saving with an image

    def save_disks(self, mode: str, folder: Path | None, image: Path, image_id: str, bandwidth: int = 0) -> DiskSaving:
        """Return the object that saves the disks for an image (see `disk_saving`). `mode`: `record`, `snapshot` or
        `copy`; `bandwidth`: limit for the copies, bytes per second, 0 for none."""
        from pageferry.workloads.qemu import disk_modes
        from pageferry.workloads.qemu.disk_saving import ImageOfGuest

        target = ImageOfGuest(path=image, id=image_id)
        self._last_saving = disk_modes.saving(mode, self._saving_guest, target, folder, bandwidth)
        return self._last_saving

    @property
    def _disk_saving(self) -> DiskSaving | None:
        """Object that saves the disks for the running checkpoint; None if no checkpoint is running."""
        return self._last_saving if self._last_saving is not None and not self._last_saving.ended else None

    async def commit_disks(self, progress: Progress, *, force: bool) -> tuple[list[Committed], list[Path]]:
        """Write overlays back to the disks that checkpoints have frozen (see `disk_committing.commit`)."""
        from pageferry.workloads.qemu import disk_committing

        await self.update_details()
        return await disk_committing.commit(self._saving_guest, progress, force=force)

    async def overlays(self) -> list[Overlaid]:
        """Return the disks of the guest that are overlays over frozen files. Raises WorkloadError, WorkloadDied."""
        from pageferry.workloads.qemu import frozen_files
        from pageferry.workloads.qemu.disk_saving import path_of

        await self.update_details()
        chains = [(one.shown, one.layers) for one in self._seen.machine.block_devices or () if len(one.layers) > 1]
        return [
            Overlaid(name, layers[0].path, layers[1].path)
            for name, layers in chains
            if frozen_files.find(path_of(layers[1], self.pid)) is not None
        ]

    @property
    def _saving_guest(self) -> SavingGuest:
        from pageferry.workloads.qemu.disk_saving import SavingGuest

        return SavingGuest(
            name=self.name,
            pid=self.pid,
            control=self._control,
            storage=self._storage,
            qmp_socket=self.qmp_socket,
            devices=lambda: self._seen.machine.block_devices or (),
            release=self._release_unpaused,
        )

    async def _release_unpaused(self) -> None:
        """Undo `prepare_pause` of a guest that was not paused afterwards."""
        await self._control.settled()
        if self._control.prepared:
            await self.resume()
