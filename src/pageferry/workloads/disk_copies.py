"""Interface by which a workload lets a migration copy its disks to another host while the workload runs.

Both sides open local sockets. The migration forwards their bytes over its connections.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class CopiedDisk:
    """Disk that is copied."""

    name: str
    path: str
    """File or device on this side."""
    size: int
    """Size of the disk, bytes."""


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """Progress of the copies of all disks together."""

    done: int
    """Number of bytes copied, including those copied again."""
    total: int
    """Number of bytes to copy, as known so far. Writes of the workload increase it."""
    ready: bool
    """Whether every disk has been copied once, so that only later writes remain."""

    @property
    def remaining(self) -> int:
        """Number of bytes left to copy."""
        return max(self.total - self.done, 0)


class DiskExports(Protocol):
    """Exported disks of a workload that waits for its state. The source of the workload writes to them."""

    disks: Sequence[CopiedDisk]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Indexes of the disks that the source has to copy, in the list of the disks that it describes."""

    async def open(self) -> None:
        """Export the disks. Raises WorkloadError."""

    async def connect(self) -> list[socket.socket]:
        """Return a connection for each disk. Raises WorkloadError."""

    async def flush(self) -> None:
        """Write the received data to the storage, so that the end of the copies need not wait for that. On
        cancellation, wait only for the write in progress."""

    async def close(self) -> None:
        """End the exports: no client can write to the disks any longer. Raises WorkloadError."""


class DiskMirrors(Protocol):
    """Copies of the disks of a running workload. A failed copy does not disturb the workload."""

    disks: Sequence[CopiedDisk]

    async def start(self, carry: Callable[[int, socket.socket], None]) -> None:
        """Start to copy all disks. `carry`: function that forwards the bytes of a connection for the n-th disk. Raises
        WorkloadError."""

    async def progress(self) -> CopyProgress:
        """Return the progress. Raises WorkloadError if a disk cannot be copied."""

    async def pause(self) -> None:
        """Complete the writes in flight, and begin no others until `resume`."""

    async def resume(self) -> None:
        """Continue to copy."""

    async def finish(self) -> None:
        """Complete the copies while the workload is paused, and its disks do not change. Raises WorkloadError if a copy
        is incomplete."""

    async def cancel(self) -> None:
        """End the copies, complete or not. The connections must have been closed."""


@runtime_checkable
class CopiesDisks(Protocol):
    """Workload whose disks can be copied to another host."""

    def disk_exports(self) -> DiskExports:
        """Return the exports of the disks that the accepted source copies."""

    def disk_mirrors(self, numbers: Sequence[int], buffer: int) -> DiskMirrors:
        """Return the copies of the disks with these numbers. `buffer`: maximum number of bytes in flight per disk.
        Raises WorkloadError for an invalid number."""
