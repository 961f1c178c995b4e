"""Pager of a base: one process serves all guests and programs that share the memory of one image (S10).

The base is filled on demand, once for all clones. The kernel maps a page that the base contains, without the pager. If
the pager is killed, clones wait at the next hole. The next pager of the image takes all of them over, whether it was
started for another clone or by `--takeover`: the holes of the file are the page map, and the clones have the file open.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pageferry._engine import BasePager, Space
from pageferry.errors import ImageError, RestoreError, WorkloadError
from pageferry.host import files, memory_file, proc
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import CLONE_FILE, Folder, Registry
from pageferry.images.image import ImageFile
from pageferry.images.working_set import WorkingSet
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.memory.view import mapped, numbered
from pageferry.pager import base_records, page_faults
from pageferry.pager.base_protocol import BaseStatus, CloneStatus
from pageferry.pager.base_records import BaseFolder, BaseRecord, CloneFile, CloneRecord, ImageStat
from pageferry.pager.clone_memory import CloneMemory
from pageferry.pager.fill_order import fill_order

log = logging.getLogger("pageferry.pager")

_POLL = 0.1
"""Interval of checks whether clones still run, seconds."""


ServeClient = Callable[[socket.socket, "BaseService"], None]
"""Function that executes the orders of a client until the client closes the connection."""


class BaseInUse(WorkloadError):
    """Error for a base that another pager serves."""


@dataclass(frozen=True, slots=True)
class _Served:
    """Clone that the pager serves."""

    file: CloneFile
    started: int | None
    """Start time of the clone's process; None if the process had exited before the clone was added."""
    number: int | None
    """Number of the clone in the engine; None for a clone that raises no faults."""

    @property
    def ended(self) -> bool:
        """Whether the process has exited, or has freed the memory."""
        exited = self.started is None or proc.start_time(self.file.record.pid) != self.started
        return exited or not self.file.exists


class BaseService:
    """Base of one image, and its clones. The constructor raises ImageError, RestoreError, WorkloadError, OSError, and
    BaseInUse if another pager serves the base.
    """

    def __init__(self, image: ImageFile, registry: Registry, serve: ServeClient) -> None:
        self.image = image
        self.folder = BaseFolder.of(registry, image.identity)
        self._registry = registry
        self._clones: list[_Served] = []
        self._sessions = 1
        self._closing = False
        """Whether `run` is about to return, so that clients are refused."""
        self._mutex = threading.Lock()
        self._filling = self._filling_eagerly = False
        self._reported: set[int] = set()
        lock = self.folder.lock()
        if lock is None:
            raise BaseInUse(f"the base of {image.path} is served by another pager")
        self._lock = lock
        left = list(base_records.clones_of(registry, image.identity))
        try:
            self._start(serve, left)
        except BaseException:
            if not left:  # otherwise, the next pager needs the records
                self.folder.remove()
            os.close(lock)
            raise

    def _start(self, serve: ServeClient, left: list[CloneFile]) -> None:
        """Open or create the base, and serve its clients and the clones of a pager that has exited."""
        image = self.image
        regions = [region.length // SMALL_PAGE for region in image.metadata.regions]
        self._fd = _found_file(left) if left else None
        if self._fd is None:
            self._fd = _new_file(BasePager.file_length(regions))
        self.pager = _pager(image, self._fd, regions)
        for one in left:
            self._take_over(one)
        self._publish(serve)
        fault_point("base.published")
        if any(one.record.prefetch for one in left):
            self.fill(any(one.record.eager for one in left))

    def _publish(self, serve: ServeClient) -> None:
        """Listen for clients, and store the record by which they find this pager."""
        self._listener = socket.socket(socket.AF_UNIX)
        path = self.folder.socket
        if os.path.exists(path):  # left by a pager that was killed
            os.unlink(path)
        files.bind_private(self._listener, path)
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(serve,), name="pageferry-base", daemon=True).start()
        record = BaseRecord(
            image=self._image_path, identity=self.image.identity, stat=self._image_stat, pager=os.getpid()
        )
        self.folder.store(record)

    def _accept(self, serve: ServeClient) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            if not self._begin_session():
                connection.close()
                continue
            threading.Thread(target=serve, args=(connection, self), name="pageferry-orders", daemon=True).start()

    def _begin_session(self) -> bool:
        """Record that a client has connected. Return False if the pager is exiting."""
        with self._mutex:
            self._sessions += not self._closing
            return not self._closing

    @property
    def descriptor(self) -> int:
        """Descriptor of the base in this process."""
        assert self._fd is not None
        return self._fd

    @property
    def _image_path(self) -> str:
        return str(self.image.path.absolute())

    @property
    def _image_stat(self) -> ImageStat:
        """State of the open image file. Its path may lead to another file by now."""
        return base_records.image_stat(self._image_path, self.image.image.fileno())

    def check_image(self, path: str) -> None:
        """Raise RestoreError if the file at `path` is not the image of this base. Raises OSError."""
        if base_records.image_stat(path) != self._image_stat:
            raise RestoreError(f"cannot open {path}: the image was replaced while a pager was chosen; retry")

    # -- clones

    def share(self, name: str, work: CloneRecord) -> None:
        """Replace the memory of a guest with a private mapping of the base, before the guest runs.

        The base must already be among the descriptors of the guest's process. Raises UnsupportedError for memory that
        cannot be replaced, RestoreError, CannotHandleFaults, WorkloadDied.
        """
        self._check_regions(name, work)
        space = page_faults.open_spaces([work.pid])[work.pid]
        memory = CloneMemory(space, work)
        descriptor = base_records.open_descriptor_of(work.pid, os.fstat(self.descriptor))
        if descriptor is None:
            raise RestoreError(f"cannot share memory with {name}: its process has no descriptor of the base")
        memory.replace(descriptor)
        ours, kept = page_faults.userfaults({work.pid: space}, discards=False)
        try:
            file = os.fstat(self.descriptor)
            record = msgspec.structs.replace(
                work, descriptor=descriptor, userfault=kept[work.pid], device=file.st_dev, inode=file.st_ino
            )
            clone = CloneFile(name, Folder(self._registry, name).path / CLONE_FILE, record)
            clone.store(record)
            memory.open(ours[work.pid])
            self._add(clone, ours[work.pid])
        finally:
            os.close(ours[work.pid])

    def _check_regions(self, name: str, work: CloneRecord) -> None:
        expected = [(one.name, one.length) for one in self.image.metadata.regions]
        if [(one.name, one.length) for one in work.regions] != expected:
            raise RestoreError(
                f"cannot restore {name} from {self.image.path}: the sizes of their memory differ; use the options of "
                "the guest that was saved"
            )

    def join(self, name: str, work: CloneRecord) -> None:
        """Serve the page faults of a program that has registered its mapping of the base, but permits no access to it
        yet. For a program without userfaultfd, load the base completely.

        Raises CannotHandleFaults if the userfaultfd of the program cannot be duplicated, ImageError.
        """
        self._check_regions(name, work)
        file = os.fstat(self.descriptor)
        record = msgspec.structs.replace(work, device=file.st_dev, inode=file.st_ino)
        if record.userfault < 0:
            self.ensure(0, self._length, work.image)
            self._add_program(name, record, None)
            return
        try:
            userfault = Space(record.pid).descriptor(record.userfault)
        except OSError as refused:
            raise page_faults.CannotHandleFaults(
                f"the pager cannot handle page faults of process {record.pid}: {refused}"
            ) from refused
        try:
            self._add_program(name, record, userfault)
        finally:
            os.close(userfault)

    def _add_program(self, name: str, record: CloneRecord, userfault: int | None) -> None:
        """Store the record of a program, and serve the program. If serving fails, remove the record."""
        added = self.folder.add_program(name, record)
        try:
            self._add(added, userfault)
        except BaseException:
            self.forget_program(name)
            raise

    def forget_program(self, name: str) -> None:
        """Remove the record of a program that does not use its memory."""
        self.folder.program(name).unlink(missing_ok=True)

    def _take_over(self, clone: CloneFile) -> None:
        """Serve a clone of a pager that has exited."""
        record = clone.record
        try:
            found = os.stat(f"/proc/{record.pid}/fd/{record.descriptor}")
            if not os.path.samestat(found, os.fstat(self.descriptor)):
                raise WorkloadError("its descriptor of the base refers to another file")
            userfault = Space(record.pid).descriptor(record.userfault) if record.userfault >= 0 else None
        except (OSError, WorkloadError) as failed:
            log.error("%s: cannot take over its memory: %s", clone.name, failed)
            return
        try:
            self._add(clone, userfault)
        finally:
            if userfault is not None:
                os.close(userfault)
        if record.image != self._image_path:
            with contextlib.suppress(FileNotFoundError):  # the clone has just ended
                clone.store(msgspec.structs.replace(record, image=self._image_path))
        log.info("%s: taken over", clone.name)

    def _add(self, clone: CloneFile, userfault: int | None) -> None:
        """Serve a clone. `userfault`: descriptor in this process; None for a clone that raises no faults."""
        record, number = clone.record, None
        if userfault is not None:
            space = Space(record.pid)
            number = self.pager.add(userfault, mapped({space.pid: space}, numbered(record.regions)))
        with self._mutex:
            self._clones.append(_Served(clone, proc.start_time(record.pid), number))

    # -- while clones run

    @property
    def _length(self) -> int:
        return self.image.pages * SMALL_PAGE

    def ensure(self, offset: int, length: int, image: str) -> None:
        """Load a range of the base (`offset` and `length` in bytes), and return when it is present. `image`: path for
        error messages. Raises ImageError."""
        if length == self._length and self.pager.holes:
            self._fill_with_all_processors()
        failure = self.pager.ensure(offset // LARGE_PAGE, -(-(offset + length) // LARGE_PAGE))
        if failure is not None:
            start = failure.unit * LARGE_PAGE
            raise ImageError(f"cannot read bytes {start} to {start + LARGE_PAGE} from {image}: {failure.message}")

    def fill(self, eager: bool) -> None:
        """Start to load the base in the background. Calls after the first have no effect."""
        with self._mutex:
            if self._filling:
                return
            self._filling = True
            self._filling_eagerly |= eager
        windows = WorkingSet(self.image).windows
        self.pager.fill(list(fill_order(self.image, windows).windows), eager)

    def _fill_with_all_processors(self) -> None:
        """Start to load all units with one thread per processor, unless this was done before. One call is enough: units
        that cannot be loaded are retried in any case, and the threads are joined only when the pager stops."""
        with self._mutex:
            if self._filling_eagerly:
                return
            self._filling_eagerly = True
        self.pager.fill([], True)

    def end_session(self) -> None:
        """Record that a client has closed its connection."""
        with self._mutex:
            self._sessions -= 1

    def status(self) -> BaseStatus:
        """Return the state of the base and its clones."""
        with self._mutex:
            served = list(self._clones)
        return BaseStatus(
            image=str(self.image.path),
            pager=os.getpid(),
            length=self._length,
            resident=os.fstat(self.descriptor).st_blocks * 512,
            deferred=self.pager.holes * LARGE_PAGE,
            prefetched=self.pager.prefetched * LARGE_PAGE,
            bytes_read=self.pager.bytes_read,
            failures=[self._describe(failure.unit, failure.message) for failure in self.pager.failures],
            clones=[self._status_of(one) for one in served],
        )

    def _status_of(self, one: _Served) -> CloneStatus:
        name, pid = one.file.name, one.file.record.pid
        if one.number is None:
            return CloneStatus(name=name, pid=pid, faults=0, missed=0, zeros=0)
        found = self.pager.counters(one.number)
        return CloneStatus(name=name, pid=pid, faults=found.faults, missed=found.missed, zeros=found.zeros)

    def _describe(self, unit: int, message: str) -> str:
        return (
            f"bytes {unit * LARGE_PAGE} to {(unit + 1) * LARGE_PAGE} cannot be read from {self.image.path}: {message}"
        )

    def run(self) -> None:
        """Serve until no clone and no client is left."""
        while not self._is_unused():
            time.sleep(_POLL)
            failures = self.pager.failures
            for failure in failures:
                if failure.unit not in self._reported:
                    log.error("%s", self._describe(failure.unit, failure.message))
            self._reported = {failure.unit for failure in failures}
        self.folder.remove()
        self._listener.close()
        self.pager.stop()

    def _is_unused(self) -> bool:
        """Forget the clones that have exited. Return whether no clone and no client is left; if so, no client is
        accepted from now on."""
        with self._mutex:
            for one in [one for one in self._clones if one.ended]:
                log.info("%s has ended", one.file.name)
                if one.number is not None:
                    self.pager.remove(one.number)
                self._clones.remove(one)
                if one.file.record.started:
                    one.file.path.unlink(missing_ok=True)
            self._closing = not self._clones and not self._sessions
            return self._closing


def _pager(image: ImageFile, file: int, regions: list[int]) -> BasePager:
    """Start the engine's pager. Raises RestoreError if it cannot lock the memory of its buffers."""
    try:
        return BasePager(image.chain, file, regions)
    except OSError as error:
        if error.errno not in (errno.ENOMEM, errno.EPERM):
            raise
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        raise RestoreError(
            f"cannot share the memory of {image.path}: its pager cannot lock 4 MiB for its buffers ({error.strerror}); "
            f"raise the limit of locked memory, RLIMIT_MEMLOCK, which is {soft} bytes (`ulimit -l`), or use separate "
            "memory (`own`)"
        ) from error


def _new_file(length: int) -> int:
    file = memory_file.create_ram_file(length)
    if file.warning:
        log.warning("%s", file.warning)
    os.fchmod(file.fd, base_records.MODE)
    return file.fd


def _found_file(left: list[CloneFile]) -> int | None:
    """Open the base that clones of an exited pager have open; return None if none of them can be inspected."""
    for one in left:
        try:
            return base_records.reopen_base(one.record)
        except OSError as failed:
            log.error("%s: cannot open its base: %s", one.name, failed)
    return None
