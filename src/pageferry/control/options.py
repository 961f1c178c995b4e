"""Options of the verbs that control a workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypedDict

from pageferry.errors import UsageError
from pageferry.options import Count, Duration, Text, check


class ShutdownArguments(TypedDict, total=False):
    """Keyword arguments of `shutdown` for the fields of `ShutdownOptions`."""

    timeout: float | str
    force: bool


class AdoptArguments(TypedDict, total=False):
    """Keyword arguments of `adopt` for the fields of `AdoptOptions`."""

    qmp: str | None
    libvirt: str | None
    connect: str | None


class LogArguments(TypedDict, total=False):
    """Keyword arguments of `logs` for the fields of `LogOptions`."""

    lines: int | None


class CommitArguments(TypedDict, total=False):
    """Keyword arguments of `commit_disks` for the fields of `CommitOptions`."""

    force: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownOptions:
    """Options of `shutdown`. Raises UsageError."""

    timeout: Annotated[float, Duration(0.1, 86400.0)] = 60.0
    """Maximum time for the guest to shut down."""
    force: bool = False
    """If the guest has not shut down within `timeout`, or cannot respond, end it as `stop` does."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptOptions:
    """Options of `adopt`. Exactly one of `qmp` and `libvirt` is required. Raises UsageError."""

    qmp: Annotated[str | None, Text(metavar="SOCKET")] = None
    """Unix socket of a QMP monitor that no other program uses (QEMU option -qmp unix:...)."""
    libvirt: Annotated[str | None, Text(metavar="DOMAIN")] = None
    """Name, id or UUID of a running domain of libvirt, whose XML adds a QMP socket."""
    connect: Annotated[str | None, Text(metavar="URI", unset="that of virsh")] = None
    """URI of libvirt, such as qemu:///system."""

    def __post_init__(self) -> None:
        check(self)
        if (self.qmp is None) == (self.libvirt is None):
            raise UsageError(
                "invalid arguments: expected either `qmp`, the socket of a monitor, or `libvirt`, a domain"
            )
        if self.connect is not None and self.libvirt is None:
            raise UsageError("`connect` applies to `libvirt` only; remove it, or give a domain")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions:
    """Options of `logs`. Raises UsageError."""

    lines: Annotated[int | None, Count(0, 1 << 30, metavar="N", unset="the whole log")] = None
    """Start at the last N lines."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitOptions:
    """Options of `disks commit`. Raises UsageError."""

    force: bool = False
    """Write to frozen disks even if images need them; these images can then no longer be restored."""

    def __post_init__(self) -> None:
        check(self)
