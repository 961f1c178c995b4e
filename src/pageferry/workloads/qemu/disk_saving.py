"""Saving of a guest's disks together with its memory: the steps that all modes of `checkpoint --disks` share (S4).

A checkpoint calls `prepare` while the guest runs, `freeze` in the pause, and `complete` after the memory is saved; or
`abandon` after a failure. `freeze` is called before the device state is saved: QEMU's migration of the device state
deactivates all block nodes, and block jobs and overlays would start on nodes that QEMU may no longer write to.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from pageferry.errors import PageferryError, UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host import files
from pageferry.host.guardian import Action, Guardian, MonitorCommands
from pageferry.host.qmp import Command
from pageferry.workloads.protocols import DISKS, SavedDisk
from pageferry.workloads.qemu import block_devices, disk_cache, disk_comparison, disk_files
from pageferry.workloads.qemu.block_devices import BlockDevice, DiskRecord, Layer
from pageferry.workloads.qemu.block_jobs import Progress
from pageferry.workloads.qemu.control import QemuControl
from pageferry.workloads.qemu.frozen_files import Need
from pageferry.workloads.qemu.storage import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingGuest:
    """Guest whose disks are saved."""

    name: str
    pid: int
    control: QemuControl
    storage: Storage
    qmp_socket: str
    devices: Callable[[], tuple[BlockDevice, ...]]
    """Function that returns the last known block devices of the guest."""
    release: Callable[[], Awaitable[None]]
    """Function that undoes `prepare_pause` if the guest was not paused afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOfGuest:
    """Image to which the guest is saved."""

    path: Path
    id: str

    @property
    def need(self) -> Need:
        """Need of this image for a frozen file."""
        return Need(kind="image", path=str(self.path), id=self.id)

    @property
    def short_id(self) -> str:
        """Beginning of the id, for names of files and block nodes."""
        return self.id[:8]


class DiskSaving:
    """Mode `record`: only the caches of the disks are flushed. Base class of the other modes."""

    def __init__(self, guest: SavingGuest, image: ImageOfGuest) -> None:
        self.guest = guest
        self.image = image
        self.saved: tuple[SavedDisk, ...] = ()
        """Disks that `complete` has saved."""
        self.ended = False
        """Whether the disks are saved, or all steps undone."""
        self._guardian: Guardian | None = None

    async def prepare(self) -> None:
        """Flush the disks, and create and open all files, while the guest runs. Raises WorkloadError, UnsupportedError,
        OSError."""
        await self.flush()

    async def flush(self) -> None:
        """Flush the host's page cache for all disks that the guest can write to."""
        places = self.guest.storage.places(self.guest.devices())
        if places:
            await disk_cache.flush_beside(places)

    @property
    def keeps_disks(self) -> bool:
        """Whether QEMU must keep the disks open while it saves the device state, which its migration does not do.

        When `cont` opens a released disk again, QEMU drops the page cache of its file, unless the disk bypasses the
        cache. This prolongs the pause, and the guest then reads from the storage again.
        """
        return any(disk.cache.startswith("buffered") for disk in self._disks())

    async def freeze(self) -> None:
        """Freeze or start to copy all disks of the paused guest. Raises WorkloadError with QEMU's message."""

    async def resumed(self) -> None:
        """Copy without a speed limit, because the pause has ended. If there is a bandwidth limit, only the memory uses
        it until `complete`."""

    def before(self, devices: tuple[BlockDevice, ...]) -> tuple[BlockDevice, ...]:
        """Return the current devices as they were before `freeze`, which may have added overlays."""
        return devices

    @property
    def is_complete_record(self) -> bool:
        """Whether the image contains all disks that the guest can write to."""
        return False

    async def complete(self, record: DiskRecord | None, progress: Progress) -> DiskRecord | None:
        """Wait until the disks are saved. Return the record of the disks for the image. `record`: record as of the
        snapshot point. Raises WorkloadError."""
        return record

    async def finish(self, details: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Wait until the disks are saved, and return the details of the image with the saved disks. `details`: details
        as of the snapshot point. Raises WorkloadError."""
        record = block_devices.decode(details)
        if record is None and self.is_complete_record and self._disks():
            raise WorkloadError(f"cannot save the disks of {self.guest.name}: {disk_comparison.CHANGED}")
        found = await self.complete(record, progress)
        self.ended = True
        return details if found is record or found is None else {**details, DISKS: block_devices.encode(found)}

    async def abandon(self) -> None:
        """Undo all steps, after a failure at any point. The guest keeps its disks and runs."""
        for step in (self._undo, self.guest.release):
            with self._logged():
                await step()
        self._unwatch()
        self.ended = True

    async def _undo(self) -> None:
        """Undo the steps of a mode that creates files."""

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        """Log an error of the block, which undoes a step: the caller reports the error of the checkpoint, and other
        steps must be undone too."""
        try:
            yield
        except WorkloadDied:
            log.info("%s: exited before a failed checkpoint was undone", self.guest.name)
        except (PageferryError, OSError) as error:
            log.warning("%s: cannot undo a step of the failed checkpoint: %s", self.guest.name, error)

    # -- for the other modes

    def _disks(self) -> list[BlockDevice]:
        """Return the devices to save: those that the guest can write to."""
        found = self.guest.storage.record(self.guest.devices()).media
        return [one for one in found if not one.read_only]

    def _watch(self, actions: Sequence[Action]) -> None:
        """Start a guardian, which executes these actions if this process exits."""
        if self._guardian is None:
            self._guardian = Guardian(f"the disks of {self.guest.name}, {os.path.abspath(self.guest.qmp_socket)}")
        self._guardian.plan(actions)

    def _unwatch(self, *, undo: bool = False) -> None:
        """End the guardian. `undo`: whether it executes its actions, as soon as QEMU replies."""
        if self._guardian is not None:
            guardian, self._guardian = self._guardian, None
            if not undo:
                guardian.plan([])
            guardian.close()

    def _commands(self, commands: Sequence[Command], jobs: Sequence[str] = ()) -> MonitorCommands:
        return MonitorCommands(os.path.abspath(self.guest.qmp_socket), commands, jobs)

    async def _run(self, *commands: Command) -> None:
        async with self.guest.control.session() as monitor:
            for command in commands:
                await monitor.run(command)

    async def _try(self, *commands: Command) -> None:
        """Execute commands, each of which may fail, because `prepare` may not have created all nodes."""
        for command in commands:
            with contextlib.suppress(WorkloadError):
                await self._run(command)

    async def _close(self, nodes: Collection[str]) -> set[str]:
        """Close block nodes that are not in use. Return the names of those that remain, because the guest or a job uses
        them. Raises WorkloadError, WorkloadDied."""
        await self._try(*map(deletion, nodes))
        async with self.guest.control.session() as monitor:
            found = await monitor.execute("query-named-block-nodes", flat=True)
        return {one["node-name"] for one in found} & set(nodes)

    def _new_file(self, path: Path, purpose: str) -> int:
        """Create a file that QEMU can open, and return its descriptor. Raises WorkloadError if the file exists or
        cannot be created, UnsupportedError if QEMU does not find it at this path, OSError."""
        try:
            descriptor = files.create_new(path)
        except FileExistsError as exists:
            raise WorkloadError(
                f"cannot create {path}, {purpose}: the file exists; remove it, or choose another directory"
            ) from exists
        except OSError as error:
            missing = "; create the directory" if isinstance(error, FileNotFoundError) else ""
            raise WorkloadError(f"cannot create {path}, {purpose}: {error.strerror}{missing}") from error
        try:
            self._hand_over(descriptor, path)
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise
        return descriptor

    def _hand_over(self, descriptor: int, path: Path) -> None:
        """Give a new file to the user of QEMU, and check that QEMU finds it at this path."""
        try:
            process, seen = os.stat(f"/proc/{self.guest.pid}"), os.stat(f"/proc/{self.guest.pid}/root{path}")
        except FileNotFoundError as gone:
            raise self._not_visible(path) from gone
        if os.geteuid() == 0:
            os.fchown(descriptor, process.st_uid, process.st_gid)
        ours = os.fstat(descriptor)
        if (ours.st_dev, ours.st_ino) != (seen.st_dev, seen.st_ino):
            raise self._not_visible(path)

    def _not_visible(self, path: Path) -> Exception:
        if not os.path.exists(f"/proc/{self.guest.pid}"):
            return WorkloadDied(f"{self.guest.name} (process {self.guest.pid}) has exited")
        return UnsupportedError(
            f"cannot create {path} for {self.guest.name}: QEMU runs in another mount namespace, and does not find "
            "the file at this path; choose a directory that both namespaces share"
        )


def opening(node: str, path: Path, disk: BlockDevice, cached: dict[str, Any]) -> Command:
    """Return the command that opens a qcow2 file as a block node, with the cache mode of a disk, and without its
    backing file, which `blockdev-snapshot` attaches."""
    cache = {"direct": disk.cache.startswith("direct"), "no-flush": disk.cache.endswith(",no-flush")}
    file = {"driver": "file", "filename": str(path), "cache": cache}
    arguments = {"driver": "qcow2", "node-name": node, "file": file, "cache": cache, **cached}
    return {"execute": "blockdev-add", "arguments": arguments}


def deletion(node: str) -> Command:
    """Return the command that closes a block node. QEMU refuses it while the node is in use."""
    return {"execute": "blockdev-del", "arguments": {"node-name": node}}


def as_before(device: BlockDevice, disk: BlockDevice) -> BlockDevice:
    """Return a device with the properties that it had before another block node was put on top of its disk."""
    return replace(device, node=disk.node, name=disk.name, cache=disk.cache)


def stem_of(path: Path) -> str:
    """Return the name of a file of a disk without the usual suffixes."""
    return path.name.removesuffix(".qcow2").removesuffix(".raw").removesuffix(".img")


def described(layer: Layer) -> str:
    """Return the words that name an image in error messages."""
    return layer.path if len(layer.path) <= 200 else layer.path[:200] + "..."


def path_of(layer: Layer, pid: int) -> Path:
    """Return the absolute path of an image of a QEMU process. Raises WorkloadError if the process has exited."""
    return Path(disk_files.absolute(layer.path, pid))


def file_of_disk(disk: BlockDevice, pid: int) -> Path:
    """Return the absolute path of the file of a disk. Raises UnsupportedError if the disk is not in a regular file, or
    if this process finds another file at the path."""
    top = disk.layers[0]
    if top.file is None or top.file.kind != "file" or top.offset or top.driver not in ("", "file"):
        raise UnsupportedError(
            f"cannot freeze disk {disk.shown} ({described(top)}): it is not a separate regular file, and later writes "
            "to it would not be detected; use --disks copy:DIR"
        )
    if top.temporary:
        raise UnsupportedError(
            f"cannot freeze disk {disk.shown}: its overlay is temporary (snapshot=on); use --disks copy:DIR"
        )
    try:
        path = Path(os.path.realpath(path_of(top, pid)))
        found = os.stat(path)
    except OSError as error:
        raise UnsupportedError(
            f"cannot freeze disk {disk.shown} ({described(top)}): {error.strerror}; use --disks copy:DIR"
        ) from error
    if (found.st_dev, found.st_ino) != (top.file.device, top.file.inode):
        raise UnsupportedError(
            f"cannot freeze disk {disk.shown}: {path} is not the file that QEMU has open; use --disks copy:DIR"
        )
    return path
