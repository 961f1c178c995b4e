"""Memory of an image that several processes of a host share: private pages over the base of the image (S10).

Correctness depends on the order of the steps, as for a guest (`pager.clone_memory`). Without a userfaultfd that handles
the faults of system calls, the base is loaded completely before it is mapped. No access then waits for a pager.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import Any, NoReturn, Self

import msgspec

from pageferry import _engine, values
from pageferry._engine import Advice, BasePager, Space
from pageferry.errors import RestoreError, UnsupportedError, UsageError
from pageferry.host import forks, proc
from pageferry.host.blocking import on_new_loop
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Registry
from pageferry.images.metadata import ImageIdentity, Metadata
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import base_client, page_faults
from pageferry.pager.base_client import OpenedBase
from pageferry.pager.base_records import BaseFolder, CloneRecord
from pageferry.pager.launcher import PagerConnection, status_of_base
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.records import RegionRecord, SegmentRecord
from pageferry.workloads import handles
from pageferry.workloads.addresses import reserving
from pageferry.workloads.handle import SharedHandle

log = getLogger(__name__)

_OWN = 'restore it with memory="own"'
_numbers = itertools.count(1)


class SharedArena(handles.ProgramMapping):
    """Memory of an image, of which all processes of this user on this host share one copy. Writes are private.

    A page that this process writes to is copied, and the change is lost with the object. `pageferry.dump` saves arrays
    of this memory. It cannot be migrated, or saved by a checkpoint.

    An access to a page that cannot be read, because the image is damaged or missing, waits until the page can be read;
    it never reads zeros. `ensure` and `load` raise ImageError instead. If the pager is killed, accesses to deferred
    pages wait until another one is started: by the next restore of the image with shared memory in another process, by
    `load()` in another thread, or by `pageferry restore --takeover`.
    """

    image: Path
    identity: ImageIdentity
    received_state: bytes
    """State in the image."""
    eager_reason: str | None
    """Reason why all contents were loaded before this object was created; None if they are loaded on demand."""
    _registry: Registry
    _name: str
    _base: int
    """Descriptor of the base, open for reading."""
    _writable: bool

    @classmethod
    def open(
        cls,
        image: Path,
        *,
        prefetch: bool = True,
        eager: bool = False,
        writable: bool = True,
        expected: ImageIdentity | None = None,
        on_eager: Callable[[str, int], object] = lambda reason, length: None,
    ) -> Self:
        """Map the memory of an image. If page faults cannot be handled, call `on_eager` with the reason and the length
        in bytes, and load all contents before this method returns.

        `writable`: whether pages can be written to. For such memory, a kernel with strict overcommit
        (vm.overcommit_memory=2) counts the whole length in each process. `expected`: required identity of the image.
        Raises ImageError, RestoreError, UsageError if the image is not of an arena.
        """
        return on_new_loop(lambda: cls._open(image.absolute(), prefetch, eager, writable, expected, on_eager))

    @classmethod
    async def _open(
        cls,
        image: Path,
        prefetch: bool,
        eager: bool,
        writable: bool,
        expected: ImageIdentity | None,
        on_eager: Callable[[str, int], object],
    ) -> Self:
        registry = Registry()
        try:
            base = await base_client.connect(registry, image, expected)
        except UnsupportedError as refused:
            raise UnsupportedError(f"cannot share the memory of {image}: {refused}; otherwise {_OWN}") from refused
        try:
            self = cls._reserve(image, base, registry)
            self._writable = writable
            work = self._record(base, prefetch, eager)
            try:
                await self._map_lazily(base.pager, work)
            except CannotHandleFaults as refused:
                self.eager_reason = str(refused)
                on_eager(self.eager_reason, self.length)
                await self._map_complete(base.pager, work)
        except BaseException:
            base.pager.close()
            raise
        base.pager.leave()
        return self

    @classmethod
    def _reserve(cls, image: Path, base: OpenedBase, registry: Registry) -> Self:
        """Create the object over reserved addresses. Raises UsageError, RestoreError."""
        length = _length(image, base.metadata)
        scratch = os.memfd_create("pageferry-shared", os.MFD_CLOEXEC)
        try:
            os.ftruncate(scratch, length)
            with reserving(image.name, length):
                self = super().__new__(cls, scratch, length)
        finally:
            os.close(scratch)
        handles.remember(self, self.descriptor)
        self.image, self.identity, self.received_state, self.eager_reason = image, base.identity, base.state, None
        self._registry, self._name = registry, f"process-{os.getpid()}-{next(_numbers)}"
        return self

    def _record(self, base: OpenedBase, prefetch: bool, eager: bool) -> CloneRecord:
        """Open the base in this process, and return the record of this mapping. Raises RestoreError."""
        descriptor = base_client.open_file(base.opened, self.image)
        try:
            self._base = _engine.Mapping.keep(self, descriptor)
        finally:
            os.close(descriptor)
        record = BaseFolder.of(self._registry, self.identity).program(self._name)
        # At exit, other threads may still use the memory.
        weakref.finalize(self, _leave, os.getpid(), record).atexit = False
        segment = SegmentRecord(os.getpid(), self.address, self.length, 0)
        region = base.metadata.regions[0]
        return CloneRecord(
            image=str(self.image),
            identity=self.identity,
            pid=os.getpid(),
            started=proc.start_time(os.getpid()) or 0,
            regions=[RegionRecord(region.name, region.length, 0, SMALL_PAGE, [segment])],
            descriptor=self._base,
            prefetch=prefetch,
            eager=eager,
        )

    async def _map_lazily(self, pager: PagerConnection, work: CloneRecord) -> None:
        """Map the base, whose pages are loaded on demand. Raises CannotHandleFaults; after an error, the memory cannot
        be accessed."""
        space = Space()
        ours, _ = page_faults.userfaults({space.pid: space}, discards=False)
        try:
            userfault = _engine.Mapping.keep(self, ours[space.pid])
        finally:
            os.close(ours[space.pid])
        _engine.Mapping.replace(self, work.descriptor)
        space.madvise(self.address, self.length, Advice.DONTFORK)
        BasePager.register(userfault, self.address, self.length)
        await pager.join(self._name, msgspec.structs.replace(work, userfault=userfault))
        fault_point("shared.joined")
        self._permit_access()
        forks.before_fork(self, SharedArena._before_fork)

    async def _map_complete(self, pager: PagerConnection, work: CloneRecord) -> None:
        """Load the base completely, and map it. Raises ImageError."""
        log.warning(
            "%s: loading all %d MiB in advance, because on-demand loading is unavailable: %s",
            self.image,
            self.length >> 20,
            self.eager_reason,
        )
        await pager.join(self._name, work)
        _engine.Mapping.replace(self, work.descriptor)
        self._permit_access()

    def _permit_access(self) -> None:
        if self._writable:
            _engine.Mapping.permit(self)
        else:
            Space().make_read_only(self.address, self.length)

    @property
    def deferred(self) -> int:
        """Memory that is not loaded yet, bytes. Raises RestoreError if the pager has exited before the base contained
        all of the memory; `load` starts another pager."""
        if self.eager_reason is not None or self._has(0, self.length):
            return 0
        status = status_of_base(BaseFolder.of(self._registry, self.identity))
        if status is None:
            raise RestoreError(f"cannot query the pager of {self.image}: it has exited; load() starts another pager")
        return status.deferred

    def ensure(self, offset: int, length: int) -> None:
        """Load a range of the memory (`offset` and `length` in bytes), and return when it is present. Start another
        pager if there is none. Raises ImageError, RestoreError, UsageError if the range is invalid."""
        values.count("offset", offset, 0, self.length)
        if values.count("length", length, 0, self.length) > self.length - offset:
            raise UsageError(f"invalid range of {length} bytes at {offset}: the arena has {self.length} bytes")
        if self.eager_reason is None and length and not self._has(offset, length):
            on_new_loop(lambda: self._ensure(offset, length))

    def handle(self) -> SharedHandle:
        """Return a handle by which another process of this user opens the same image. Changes of this process are not
        visible in the other one."""
        with _lock:
            _handed[self.identity] = self
        return SharedHandle(image=str(self.image), identity=self.identity)

    async def _ensure(self, offset: int, length: int) -> None:
        pager = await base_client.connect_to_loader(self._registry, self.image, self.identity)
        try:
            await pager.ensure(offset, length, str(self.image))
        finally:
            pager.close()

    def _has(self, offset: int, length: int) -> bool:
        """Return whether the base contains a range (`offset` and `length` in bytes), so that no access to the range
        requires a pager. Zeros that the base does not store require one."""
        return os.lseek(self._base, offset, os.SEEK_HOLE) >= offset + length

    def load(self) -> None:
        """Load all contents. Start another pager if there is none. Raises ImageError, RestoreError."""
        self.ensure(0, self.length)

    def _before_fork(self) -> None:
        """Load all contents before a fork, because no pager handles the faults of the child. If that fails, the child
        has no mapping at these addresses: an access ends it, instead of reading zeros."""
        self.load()
        Space().madvise(self.address, self.length, Advice.DOFORK)
        forks.forget(self)

    @property
    def descriptor(self) -> int:
        """Descriptor of the empty file that was mapped at these addresses before the base."""
        return super().fileno()

    def fileno(self) -> int:
        """Raise UnsupportedError: the private pages have no file."""
        self._refuse("fileno")

    def data_ranges(self) -> list[tuple[int, int]]:
        """Raise UnsupportedError."""
        self._refuse("data_ranges")

    def large_units(self) -> list[bool]:
        """Raise UnsupportedError."""
        self._refuse("large_units")

    def discard(self, start: int, length: int) -> None:
        """Raise UnsupportedError."""
        self._refuse("discard")

    def close_memory(self) -> None:
        """Raise UnsupportedError."""
        self._refuse("close_memory")

    def _refuse(self, method: str) -> NoReturn:
        raise UnsupportedError(f"cannot call {method} for shared memory of {self.image}: its pages are private; {_OWN}")

    def __reduce_ex__(self, protocol: object) -> Any:
        """Raise UsageError: the private pages of this process would be lost."""
        raise UsageError(
            f"cannot pickle the shared memory of {self.image}: changes are private; restore the image with "
            'memory="shared" in the other process, which shares the unchanged pages'
        )

    def __repr__(self) -> str:
        return f"<SharedArena of {self.image}: {self.length >> 20} MiB>"


_handed: weakref.WeakValueDictionary[ImageIdentity, SharedArena] = weakref.WeakValueDictionary()
"""Memory of each image for which this process has created or opened a handle."""
_lock = forks.Lock()


def attach_shared(handle: SharedHandle) -> SharedArena:
    """Return the memory of a handle, read-only. Each process opens it once. Raises ImageError, RestoreError,
    WorkloadError."""
    with _lock:
        found = _handed.get(handle.identity)
        if found is None:
            found = SharedArena.open(Path(handle.image), writable=False, expected=handle.identity)
            _handed[handle.identity] = found
        return found


def _length(image: Path, found: Metadata) -> int:
    if found.kind != "arena" or len(found.regions) != 1:
        raise UsageError(
            f"cannot restore {image} as an arena: it is an image of {found.name}, a workload of kind {found.kind}"
        )
    return found.regions[0].length


def _leave(pid: int, record: Path) -> None:
    """Remove the record of memory that is no longer used, so that the pager need not serve it."""
    if os.getpid() == pid:
        record.unlink(missing_ok=True)
