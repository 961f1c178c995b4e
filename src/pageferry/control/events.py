"""Results of the verbs that control a workload."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pageferry.events import Event


class RunStateResult(Event, frozen=True, kw_only=True, tag="run-state"):
    """Result of `pause` or `resume` for one guest."""

    workload: str
    status: Literal["running", "paused"]
    changed: bool
    """Whether the command has changed the status; False if the guest already had this status."""


class RunStateResults(Event, frozen=True, tag="run-states"):
    """Results of `pause` or `resume` for several guests."""

    results: list[RunStateResult]


class GuestLog(Event, frozen=True, kw_only=True, tag="guest-log"):
    """Log of a guest, or the next part of a log that is followed."""

    workload: str
    text: str
    """Output of QEMU. Bytes that are not UTF-8 are replaced."""


class MonitorReply(Event, frozen=True, kw_only=True, tag="monitor-reply"):
    """Result of a command of QEMU's monitor."""

    workload: str
    command: str
    """Name of the command, without its arguments."""
    output: str | None
    """Output of an HMP command; None for QMP."""
    result: Any
    """Result of a QMP command; None for HMP."""


class StopResult(Event, frozen=True, kw_only=True, tag="stopped"):
    """Result of `shutdown`: QEMU has exited, and the name is free."""

    workload: str
    forced: bool
    """Whether QEMU was ended by `quit`, because the guest did not shut down; this acts like a power cut."""
    duration_ms: float
    """Time from the request until QEMU had exited, milliseconds."""


class CommittedDisk(msgspec.Struct, frozen=True, rename="kebab"):
    """Disk to whose file overlays were written back."""

    name: str
    path: str
    """File that the guest uses again."""
    removed: list[str]
    """Overlays that were removed."""


class DisksCommitted(Event, frozen=True, kw_only=True, tag="disks-committed"):
    """Result of `disks commit`."""

    workload: str
    disks: list[CommittedDisk]
    removed: list[str]
    """Overlays of a killed checkpoint that were removed, and had never been used or had been written back."""


class KeptFile(msgspec.Struct, frozen=True, rename="kebab"):
    """File of a disk that was not deleted together with an image."""

    path: str
    needed_by: list[str]
    """Images and overlays that need the file; empty for the disk of a guest, which is writable again."""


class ImageDeleted(Event, frozen=True, kw_only=True, tag="image-deleted"):
    """Result of `image delete`."""

    image: str
    removed: list[str]
    """Copies of disks that were deleted."""
    kept: list[KeptFile]
