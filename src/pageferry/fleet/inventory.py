"""State of one host for the fleet: workloads, bases and images, read from the host's own registry."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pageferry.errors import ImageError, PageferryError, UnsupportedError, WorkloadError
from pageferry.fleet import records
from pageferry.fleet.model import Host, Image, Record, Status, Workload
from pageferry.fleet.operations import Operations
from pageferry.fleet.protocol import RECEIVE, HostReport, OperationReport
from pageferry.host import jobs
from pageferry.host.blocking import in_thread
from pageferry.host.proc import meminfo
from pageferry.host.registry import Folder, Registry
from pageferry.images.image import open_link
from pageferry.images.metadata import ImageIdentity
from pageferry.migration.ownership import committed
from pageferry.pager.base_records import base_folders, clone_record
from pageferry.workloads.events import WorkloadInfo
from pageferry.workloads.inventory import describe_all

MAX_IMAGES = 256
"""Maximum number of files of a directory of images that are examined."""
_STATUS: Mapping[str, Status] = {"running": "running", "paused": "paused", "committed": "unknown"}


class HostConfig(Record, frozen=True, kw_only=True):
    """Configuration of a host's agent: the options of `pageferry fleet join`."""

    name: str
    address: str
    """Address on which receivers listen, without a port."""
    run_directory: str
    tls: str | None = None
    """Directory of certificates; None only with `insecure`."""
    insecure: bool = False
    images: tuple[str, ...] = ()
    """Directories of images whose memory clones may share."""
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    uplinks: tuple[str, ...] = ()
    link: int = 125_000_000
    """Rate of the network interface, bytes per second."""
    memory: int | None = None
    """Memory for workloads, bytes; None: the memory that is available, and that of its workloads."""
    headroom: int = 0
    timeout: float = 30.0
    """Seconds of silence after which a peer counts as lost."""


@dataclass(slots=True)
class Inventory:
    """Reader of the state of a host. It keeps what a workload that is in use by an operation does not report."""

    config: HostConfig
    registry: Registry
    operations: Operations
    _sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Memory and private memory of each workload at its last report, bytes."""
    _images: dict[tuple[str, int, int], Image | None] = field(default_factory=dict)
    """Images by path, inode and time of modification."""

    async def report(self) -> HostReport:
        """Return the state of the host."""
        operations = await in_thread(lambda: list(self.operations.reports()))
        for moved in await in_thread(lambda: list(self.operations.workloads())):
            await in_thread(records.remember, self.registry, moved)
        arriving = arriving_workloads(operations)
        described = [one for one in await describe_all(self.registry) if one.status != "moved"]
        found = [await in_thread(self._workload, one) for one in described if one.name not in arriving]
        images = await in_thread(lambda: list(self._all_images()))
        bases = await in_thread(self._bases)
        return HostReport(
            host=self._host(found, images, bases),
            address=self.config.address,
            workloads=tuple(found),
            images=tuple(images),
            operations=tuple(operations),
            notes=tuple(_notes()),
        )

    def find_image(self, identity: str) -> Path | None:
        """Return the path of an image in the directories of this host; None if there is none."""
        for path in self._files():
            image = self.image(path)
            if image is not None and image.identity == identity:
                return path
        return None

    def image(self, path: Path) -> Image | None:
        """Return the description of an image file; None if it is not a complete image."""
        try:
            found = path.stat()
            key = (str(path), found.st_ino, found.st_mtime_ns)
            if key not in self._images:
                self._images[key] = _described(path)
            return self._images[key]
        except OSError:
            return None

    def _workload(self, info: WorkloadInfo) -> Workload:
        entry = self.registry.entries().get(info.name)
        record = records.membership(self.registry, info.name)
        folder = Folder(self.registry, info.name)
        clone = clone_record(folder)
        if info.memory is not None:
            self._sizes[info.name] = (info.memory, info.resident or 0)
        memory, private = self._sizes.get(info.name, (0, 0))
        running = jobs.running(folder.path)
        return Workload(
            name=info.name,
            host=self.config.name,
            kind=info.kind,
            memory=memory,
            private=private,
            base=None if clone is None else identity_of(clone.identity),
            dirty_rate=next((job.dirty_rate for job in running if job.dirty_rate is not None), None),
            labels=record.labels,
            group=record.group,
            status=self._status(info, folder),
            cannot={} if entry is None else _cannot(self.registry, info.name, entry, shares=clone is not None),
        )

    def _status(self, info: WorkloadInfo, folder: Folder) -> Status:
        if info.status == "paused" and is_committed(folder):
            return "unknown"
        return _STATUS.get(info.status, "busy")

    def _host(self, workloads: list[Workload], images: list[Image], bases: Mapping[str, int]) -> Host:
        config = self.config
        used = sum(one.private for one in workloads) + sum(bases.values())
        memory = config.memory if config.memory is not None else meminfo()["MemAvailable"] + used
        return Host(
            name=config.name,
            memory=memory,
            headroom=config.headroom,
            link=config.link,
            cores=os.cpu_count() or 1,
            images=frozenset(one.identity for one in images) | frozenset(bases),
            bases=frozenset(bases),
            labels=config.labels,
            uplinks=config.uplinks,
        )

    def _bases(self) -> dict[str, int]:
        """Return the memory of each base of this host, bytes, by the identity of its image."""
        found = {}
        for folder in base_folders(self.registry):
            record = folder.load()
            image = None if record is None else self.image(Path(record.image))
            if record is not None:
                found[identity_of(record.identity)] = 0 if image is None else image.memory
        return found

    def _all_images(self) -> Iterator[Image]:
        seen = set()
        for path in self._files():
            image = self.image(path)
            if image is not None and image.identity not in seen:
                seen.add(image.identity)
                yield image

    def _files(self) -> Iterator[Path]:
        for folder in map(Path, self.config.images):
            names = sorted(os.listdir(folder))[:MAX_IMAGES] if folder.is_dir() else []
            yield from (folder / name for name in names if (folder / name).is_file())


def identity_of(identity: ImageIdentity) -> str:
    """Return the identity of an image as the fleet's records contain it, `ID:DIGEST`."""
    return f"{identity.id}:{identity.digest}"


def arriving_workloads(operations: list[OperationReport]) -> set[str]:
    """Return the names of workloads that this host is receiving, and does not own yet. The last receiver of a name
    counts. A receiver of missing pages (`resumes`) belongs to a workload that runs here."""
    last = {one.workload: one for one in operations if one.kind == RECEIVE and not one.resumes}
    return {name for name, one in last.items() if one.state == "running" and not one.received}


def _described(path: Path) -> Image | None:
    try:
        link = open_link(path)
    except (ImageError, OSError):
        return None
    memory = sum(region.length for region in link.metadata.regions)
    return Image(identity=identity_of(link.identity), memory=memory, name=str(path))


def is_committed(folder: Folder) -> bool:
    """Return whether the source of a migration has committed the workload, and has not learned the outcome."""
    try:
        return committed(folder) is not None
    except WorkloadError:
        return True  # the record cannot be read: an operator must look at it


def _cannot(registry: Registry, name: str, entry: object, *, shares: bool) -> dict[str, str]:
    try:
        records.prepare(registry, name, entry)  # type: ignore[arg-type]
    except UnsupportedError as error:
        return {"move": str(error)}
    except PageferryError:
        return {}  # it has just exited
    if shares:
        reason = "it shares the memory of its image"
        return {"postcopy": reason, "hybrid": reason}
    return {}


def _notes() -> Iterator[str]:
    """Yield what an operator should know about the processes of this agent."""
    if os.geteuid() != 0 and os.getpriority(os.PRIO_PROCESS, 0) > 0:
        yield (
            f"workloads that this agent starts have the niceness {os.getpriority(os.PRIO_PROCESS, 0)}: Ray was started "
            "without RAY_worker_niceness=0, and only root can lower it"
        )
