"""Write trace that a checkpoint leaves installed, so that the next checkpoint finds the pages written since (S2, S4).

The trace is a userfaultfd in asynchronous mode: no process has to read it, and no write waits for a reader. The traced
process keeps the descriptor open. A record contains all other data for the next checkpoint. It is stored as
`trace.json` in the workload's directory, or, for an arena without a name, in the memory of its program.

A record is valid only if the processes, mappings and descriptors have not changed since it was stored, and the program
has not forked in that time. The next checkpoint must have the recorded image as its parent. Other operations that need
the workload's page tables (a migration, huge-page management) remove the trace with `forget`; so does `pageferry
checkpoint --no-track`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import msgspec

from pageferry._engine import MappedSegment, Space
from pageferry.errors import PageferryError
from pageferry.host import files, forks, proc
from pageferry.host.registry import Folder
from pageferry.memory.view import Memory
from pageferry.workloads.folders import folder_of
from pageferry.workloads.protocols import Live

RECORD = "trace.json"
_FORKS = "forks"


class Unusable(Exception):
    """Error for a trace that cannot be used, with the reason."""


class Descriptor(msgspec.Struct, frozen=True):
    """Userfaultfd of a process."""

    number: int
    """Descriptor number in that process."""
    inode: int
    """Inode of the userfaultfd. Inodes are unique, so a reused descriptor number is detected."""
    started: int
    """Start time of the process, as returned by `proc.start_time`."""


class Place(msgspec.Struct, frozen=True):
    """Traced mapping: process, address, length in bytes, index of the region, and first page within the region."""

    pid: int
    address: int
    length: int
    region: int
    first_page: int


class LeftTrace(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a write trace."""

    descriptors: dict[int, Descriptor]
    """Descriptors by process id."""
    places: list[Place]
    forks: int
    """Number of forks of the program when the trace was installed. Writes of a child are not traced."""
    image: tuple[str, str] | None = None
    """Id and digest of the image since which writes are recorded; None while a checkpoint is running."""


def begin(workload: Live, segments: Sequence[MappedSegment]) -> dict[int, int]:
    """Create userfaultfds for the processes of `segments`. Return descriptors in this process, by process id, which the
    caller closes.

    The record is stored before any memory is registered: if this process exits, a later checkpoint can remove the
    userfaultfds.
    """
    forget(workload)
    _tidy()
    ours: dict[int, int] = {}
    kept: dict[int, Descriptor] = {}
    known = _forks(workload)
    try:
        for space in (segment.space for segment in segments):
            if space.pid not in ours:
                made = space.write_traces()
                ours[space.pid] = made.descriptor
                # If the traced process is this one, it keeps a second descriptor open.
                number = os.dup(made.descriptor) if made.number is None else made.number
                kept[space.pid] = _describe(space.pid, number)
    except BaseException:
        for descriptor in ours.values():
            os.close(descriptor)
        _close(kept)
        raise
    _store(workload, LeftTrace(descriptors=kept, places=_places(segments), forks=known))
    return ours


def take_up(workload: Live, segments: Sequence[MappedSegment], image: tuple[str, str]) -> dict[int, int]:
    """Return the userfaultfds of the trace that records the writes since `image` (id, digest), in the form that `begin`
    returns.

    Until `leave` is called, the record is not valid for any image. Raises Unusable, with the reason.
    """
    record = _load(workload)
    if record is None:
        raise Unusable("the previous checkpoint left no write trace")
    if record.image is None:
        raise Unusable("the checkpoint that was to leave a write trace did not finish")
    if record.image != image:
        raise Unusable("the write trace was installed by a checkpoint to another image")
    if record.places != _places(segments):
        raise Unusable("the memory is no longer mapped at the addresses at which it was saved")
    if record.forks != _forks(workload):
        raise Unusable("the program has forked since the checkpoint")
    if workload.handed_out:
        raise Unusable("the descriptor of the memory was handed out: a process may have written without a trace")
    if not all(_is_there(pid, descriptor) for pid, descriptor in record.descriptors.items()):
        raise Unusable("the userfaultfd of the write trace was closed")
    _store(workload, msgspec.structs.replace(record, image=None))
    ours: dict[int, int] = {}
    try:
        for pid, descriptor in record.descriptors.items():
            ours[pid] = os.dup(descriptor.number) if pid == os.getpid() else Space(pid).descriptor(descriptor.number)
            if os.fstat(ours[pid]).st_ino != descriptor.inode:
                raise OSError(f"cannot use userfaultfd {descriptor.number} of process {pid}: it was replaced")
    except OSError as gone:
        for number in ours.values():
            os.close(number)
        raise Unusable("the userfaultfd of the write trace cannot be opened") from gone
    return ours


def leave(workload: Live, segments: Sequence[MappedSegment], image: tuple[str, str]) -> bool:
    """Keep the trace installed, to record the writes since `image`, and return True. If the trace is incomplete, remove
    it and return False."""
    record = _load(workload)
    # A process that mapped the memory after `begin` has written without being traced.
    if record is None or record.forks != _forks(workload) or record.places != _places(segments):
        forget(workload)
        return False
    _store(workload, msgspec.structs.replace(record, image=image))
    return True


def forget(workload: Live) -> None:
    """Remove the trace, if there is one, and restore the PMD mappings of huge pages."""
    record = _load(workload)
    if record is not None:
        _close(record.descriptors)
        _remove(workload)
        with contextlib.suppress(PageferryError, OSError):  # the workload has just exited
            memory = Memory(workload)
            memory.restore_large_mappings(memory.large_units())


def record_fork(folder: Folder) -> None:
    """Record a fork of the program in the directory of its arena."""
    with contextlib.suppress(OSError):
        descriptor = files.open_private(folder.path / _FORKS, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, b".")
        os.close(descriptor)


def _describe(pid: int, number: int) -> Descriptor:
    started = proc.start_time(pid)
    if started is None:
        raise ProcessLookupError(f"cannot describe userfaultfd {number}: process {pid} has exited")
    return Descriptor(number, _inode(pid, number) or 0, started)


def _inode(pid: int, number: int) -> int | None:
    """Return the inode of an open descriptor of a process; None if the descriptor is not open."""
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}/fd/{number}").st_ino
    return None


def _is_there(pid: int, descriptor: Descriptor) -> bool:
    return proc.is_alive(pid, descriptor.started) and _inode(pid, descriptor.number) == descriptor.inode


def _close(descriptors: dict[int, Descriptor]) -> None:
    for pid, descriptor in descriptors.items():
        if not _is_there(pid, descriptor):
            continue
        if pid == os.getpid():
            os.close(descriptor.number)
        else:
            with contextlib.suppress(OSError):  # the process has just exited, and its descriptors are closed
                Space(pid).close_fd(descriptor.number)


def _places(segments: Sequence[MappedSegment]) -> list[Place]:
    places = [Place(one.space.pid, one.address, one.length, one.region, one.first_page) for one in segments]
    return sorted(places, key=lambda place: (place.pid, place.address))


# -- storage of the records

_own: dict[tuple[int, int], LeftTrace] = {}
"""Records of arenas without a name, by device and inode of their memory file."""


def _tidy() -> None:
    """Close the userfaultfds of memory files that this process no longer maps, and delete their records."""
    mapped = {(mapping.device, mapping.inode) for mapping in proc.file_mappings(os.getpid())}
    for key in [key for key in _own if key not in mapped]:
        _close(_own.pop(key).descriptors)


def _key(workload: Live) -> tuple[int, int]:
    status = os.fstat(workload.regions[0].fd)
    return status.st_dev, status.st_ino


def _load(workload: Live) -> LeftTrace | None:
    folder = folder_of(workload)
    return _own.get(_key(workload)) if folder is None else folder.load(RECORD, LeftTrace)


def _store(workload: Live, record: LeftTrace) -> None:
    folder = folder_of(workload)
    if folder is None:
        _own[_key(workload)] = record
    else:
        folder.store(RECORD, record)


def _remove(workload: Live) -> None:
    folder = folder_of(workload)
    if folder is None:
        _own.pop(_key(workload), None)
    else:
        folder.forget(RECORD)


def _forks(workload: Live) -> int:
    folder = folder_of(workload)
    if folder is None:
        return forks.count()
    with contextlib.suppress(FileNotFoundError):
        return (folder.path / _FORKS).stat().st_size
    return 0
