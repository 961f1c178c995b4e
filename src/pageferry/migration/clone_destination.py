"""Memory of a clone at the destination of a migration: private pages over a base of this host (S2, S10).

The source names the image whose memory the clone shares, by id and digest. The destination searches for the image: the
base of a running pager, the paths given by the user, and the files in directories given by the user. A path is only a
candidate: the identity is read from the image itself, and its pager compares it again.

Before Welcome, the memory of the waiting guest is replaced by a private mapping of the base. Received pages are placed
in unnamed staging files, verified there, and moved into QEMU after each round. No access to the base is required, and
the pager of the base fills it at the same time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from pageferry._engine import Mapping, Placer, Space, TargetRegion
from pageferry.errors import ImageError, PageferryError, ProtocolError, UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.images.image import open_link
from pageferry.images.metadata import ImageIdentity
from pageferry.memory.regions import LARGE_PAGE
from pageferry.memory.view import Readable, mapped, numbered
from pageferry.migration.clone_reference import base_of
from pageferry.migration.incoming import BaseChoice, ReceivingHost
from pageferry.migration.transport import messages
from pageferry.pager import clone_memory, page_faults, records
from pageferry.pager.base_client import connect_by_identity
from pageferry.pager.base_records import BaseFolder, CloneRecord
from pageferry.pager.launcher import status_of_base
from pageferry.pager.records import RegionRecord
from pageferry.workloads.protocols import BASE_REQUIRED, CanShareBase, Migratable, clone_of

log = logging.getLogger(__name__)

MAX_CANDIDATES = 10_000
"""Maximum number of files of a directory that are searched for an image."""


async def choose_base(hello: messages.Hello, workload: Migratable, host: ReceivingHost) -> BaseChoice | None:
    """Search for the image of a clone. Return None for a workload that is not a clone, or whose source sends all pages.

    Raises ProtocolError if the source names no valid image, or selects another mode than precopy. Raises
    UnsupportedError if there is no such image, or if it cannot be shared, and the user of the source or of the receiver
    requires it.
    """
    identity = base_of(hello.details)
    if identity is None:
        if host.memory == "shared":
            raise UnsupportedError(
                f"cannot share memory with {hello.name}: the source does not name an image whose memory it shares; "
                "receive it with --memory auto"
            )
        return None
    if hello.mode != "precopy":
        raise ProtocolError(
            f"cannot receive {hello.name} in {hello.mode} mode: it shares the memory of an image; its source has to "
            "use mode precopy"
        )
    try:
        return BaseChoice(identity, await _find(identity, workload, host))
    except (PageferryError, OSError) as cause:
        note = str(cause)[: messages.MAX_NOTE]
    if host.memory == "shared" or hello.details.get(BASE_REQUIRED):
        raise UnsupportedError(f"cannot share memory with {hello.name} at the destination: {note}")
    log.warning("%s: receives separate memory: %s", hello.name, note)
    return BaseChoice(identity, None, note)


async def _find(identity: ImageIdentity, workload: Migratable, host: ReceivingHost) -> Path:
    """Return the path of the image. Raises UnsupportedError if its memory cannot be shared, ImageError if there is no
    such image."""
    if host.memory == "own":
        raise UnsupportedError("the receiver was started with --memory own")
    if not isinstance(workload, CanShareBase):
        raise UnsupportedError(f"a workload of kind {workload.identity.kind} cannot share the memory of an image")
    record = _record(identity, Path(), workload)
    await in_thread(clone_memory.check_replaceable, record)
    await in_thread(page_faults.check, {record.pid})
    if (running := await in_thread(_running_base, identity, host)) is not None:
        return running
    for candidate in host.bases:
        if (found := await in_thread(_search, candidate, identity)) is not None:
            return found
    raise ImageError(
        f"no image on this host has the id {identity.id} and the digest {identity.digest}; start the receiver with "
        "--base, and the path of that image, or of a directory that contains it"
    )


def _running_base(identity: ImageIdentity, host: ReceivingHost) -> Path | None:
    """Return the path of the image of a base that a pager of this user serves; None if there is none."""
    folder = BaseFolder.of(host.registry, identity)
    record = folder.load()
    if record is None or record.identity != identity or status_of_base(folder) is None:
        return None
    return Path(record.image)


def _search(candidate: Path, identity: ImageIdentity) -> Path | None:
    """Return the file at `candidate`, or in this directory, that is the image; None if there is none."""
    for path in _files(candidate):
        try:
            if open_link(path).identity == identity:
                return path.absolute()
        except ImageError:  # not an image, or damaged
            continue
    return None


def _files(candidate: Path) -> Iterator[Path]:
    if not candidate.is_dir():
        yield candidate
        return
    names = sorted(os.listdir(candidate))
    if len(names) > MAX_CANDIDATES:
        log.warning("%s: only the first %d of its %d files are searched", candidate, MAX_CANDIDATES, len(names))
    yield from (candidate / name for name in names[:MAX_CANDIDATES] if (candidate / name).is_file())


def _record(identity: ImageIdentity, image: Path, workload: Migratable) -> CloneRecord:
    return CloneRecord(
        image=str(image),
        identity=identity,
        pid=workload.pid,
        regions=[records.record_of(region) for region in workload.regions],
    )


async def share_base(choice: BaseChoice, workload: Migratable, host: ReceivingHost) -> StagingMemory:
    """Replace the memory of a guest, which waits for its state, by private pages over the base of the chosen image.
    Return the memory in which its pages are received.

    Raises UnsupportedError for memory that cannot be replaced, RestoreError, ImageError, WorkloadError.
    """
    assert isinstance(workload, CanShareBase), "checked by the choice"
    assert choice.image is not None, "only called for a clone that shares memory"
    pager, opened = await connect_by_identity(host.registry, choice.identity, choice.image)
    try:
        await workload.share_base(pager, opened, _record(opened.identity, choice.image, workload))
    except BaseException:
        pager.give_up()
        raise
    pager.leave()
    record = clone_of(workload)
    assert record is not None, "the workload has become a clone"
    return await in_thread(StagingMemory, workload.name, record)


class StagingMemory(Readable):
    """Staging files for the private pages of a clone that is received. The constructor raises WorkloadDied,
    WorkloadError."""

    def __init__(self, name: str, record: CloneRecord) -> None:
        self.name = name
        self.regions: list[RegionRecord] = record.regions
        try:
            space = Space(record.pid)
            self._segments = mapped({space.pid: space}, numbered(record.regions))
            self.mappings: list[Mapping] = [_staging(region.length) for region in record.regions]
            self._userfault = space.descriptor(record.userfault)
        except ProcessLookupError as gone:
            raise WorkloadDied(f"{name} (process {record.pid}) has exited") from gone
        except OSError as error:
            raise WorkloadError(f"cannot receive the memory of {name}: {error}") from error
        self._pid = record.pid

    def placer(self) -> Placer:
        """Return a placer that moves private pages into the process of the clone."""
        targets = [
            TargetRegion(mapping, region.page_size) for mapping, region in zip(self.mappings, self.regions, strict=True)
        ]
        return Placer(targets, self._segments, private={self._pid: self._userfault})

    def large_units(self) -> list[list[bool]]:
        """Return no huge pages: private pages are base pages."""
        return [[False] * -(-region.length // LARGE_PAGE) for region in self.regions]

    def close(self) -> None:
        """Free the staging files, and close the userfaultfd."""
        self.mappings.clear()
        self._segments.clear()
        if self._userfault >= 0:
            os.close(self._userfault)
            self._userfault = -1


def _staging(length: int) -> Mapping:
    descriptor = os.memfd_create("pageferry-staging")
    try:
        os.ftruncate(descriptor, length)
        return Mapping(descriptor, length)
    finally:
        os.close(descriptor)
