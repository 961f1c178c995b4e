"""Options of a migration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict

from pageferry.errors import UsageError
from pageferry.migration.transport.messages import MAX_STREAMS, Codec, Mode, Populate
from pageferry.options import Count, Duration, PathName, Rate, Text, check

if TYPE_CHECKING:
    from pageferry.migration.transport.tls import Trust

Granularity = Literal["4K", "2M", "auto"]
LargePages = Literal["keep", "ignore"]
MoveMemory = Literal["auto", "shared", "own"]
Disks = Literal["checked", "shared"]
TIMEOUT = Duration(0.1, 3600.0)
"""Type of a timeout: seconds of silence after which a peer counts as lost."""

AUTO_RELEASE = 256
"""Number of written base pages, of the 512 of a huge page, at which `auto` unprotects the whole huge page. With 256, at
most twice the written memory is sent. Lower values help fast writers, but can prevent a migration from converging
(docs/benchmarks.md)."""


class MigrationArguments(TypedDict, total=False):
    """Keyword arguments of `migrate` for the fields of `Options`."""

    mode: Mode
    max_downtime: float | str
    max_rounds: int
    auto_converge: bool
    trace_granularity: Granularity
    large_pages: LargePages
    memory: MoveMemory
    populate: Populate
    codec: Codec
    adaptive: bool
    bandwidth: int | str
    streams: int
    disks: Disks
    copy_disks: bool
    timeout: float | str
    tls: str | os.PathLike[str] | None
    tls_hostname: str | None
    insecure: bool


class RecoverArguments(TypedDict, total=False):
    """Keyword arguments of `recover` for the fields of `RecoverOptions`."""

    timeout: float | str
    tls: str | os.PathLike[str] | None
    tls_hostname: str | None
    insecure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a migration, the same as those of `pageferry migrate`.

    Durations are in seconds and rates in bytes per second, or strings such as `30ms` and `100M`. Raises UsageError.
    """

    mode: Annotated[Mode, "copying"] = "precopy"
    """Pages sent before the workload resumes at the destination: all (`precopy`), none (`postcopy`), or all until the
    rounds stop converging or a switch is requested (`hybrid`). Pages not sent by then are fetched on demand."""
    max_downtime: Annotated[float, Duration(0.0, 3600.0, 1e-3), "copying"] = 0.3
    """Switch over when the remaining pages can be sent in this time, such as 300ms or 1s."""
    max_rounds: Annotated[int, Count(1, 10_000), "copying"] = 30
    """Fail if the workload cannot switch over after N rounds."""
    auto_converge: Annotated[bool, "copying"] = False
    """Throttle the CPU time of the workload in steps while the rounds do not converge (control groups)."""
    trace_granularity: Annotated[Granularity, "copying"] = "auto"
    """Unit of the write trace: base pages, huge pages, or a unit adapted to the writes."""
    large_pages: Annotated[LargePages, "memory at the destination"] = "keep"
    """Preserve huge pages at the destination, or ignore them."""
    memory: Annotated[MoveMemory, "memory at the destination"] = "auto"
    """Memory of a clone, which shares the memory of an image: send only its private pages if the destination has that
    image (`auto`), require this (`shared`), or send all pages (`own`); see docs/clones.md."""
    populate: Annotated[Populate, "memory at the destination"] = "all"
    """Page-table entries created before the workload resumes: those of all pages, during the transfer (`all`), those of
    the pages modified during the migration (`hot`), or none."""
    codec: Annotated[Codec, "copying"] = "none"
    """Compression of page blocks."""
    adaptive: Annotated[bool, "copying"] = False
    """Do not compress while the link is faster than `codec`."""
    bandwidth: Annotated[int, Rate(), "copying"] = 0
    """Limit for all page streams together, in bytes per second, such as 100M."""
    streams: Annotated[int, Count(1, MAX_STREAMS), "copying"] = 2
    """Number of parallel page streams."""
    disks: Annotated[Disks, "disks of a guest"] = "checked"
    """Require that the disks of a guest are known to be the same at the destination (`checked`), or trust the user that
    files, devices and exports which cannot be compared are the same (`shared`); see docs/disks.md."""
    copy_disks: Annotated[bool, "disks of a guest"] = False
    """Copy the writable disks of a guest that are not the same at the destination. The corresponding disks of the
    receiver must be empty and of equal size. The disks at the source are not changed."""
    timeout: Annotated[float, TIMEOUT, "connection"] = 30.0
    """Fail when the peer has been silent for this time, such as 30s or 1m."""
    tls: Annotated[str | os.PathLike[str] | None, PathName(metavar="DIR"), "connection"] = None
    """Use TLS 1.3, and require a certificate of the receiver; DIR contains ca-cert.pem, ca-crl.pem (optional),
    client-cert.pem and client-key.pem, as for QEMU."""
    tls_hostname: Annotated[str | None, Text(metavar="NAME", unset="HOST"), "connection"] = None
    """Name to expect in the receiver's certificate."""
    insecure: Annotated[bool, "connection"] = False
    """Allow unencrypted connections to addresses other than loopback."""

    def __post_init__(self) -> None:
        check(self)
        if self.auto_converge and self.mode != "precopy":
            raise UsageError(
                f"`auto_converge` requires `mode` precopy: {self.mode} ends at any dirty rate; remove `auto_converge`"
            )
        for name in ("max_rounds", "trace_granularity"):
            if self.mode == "postcopy" and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(f"`{name}` has no effect with `mode` postcopy, which has no rounds; remove it")
        if self.adaptive and self.codec == "none":
            raise UsageError(
                "`adaptive` requires a `codec`, without which nothing is compressed: choose one, or remove `adaptive`"
            )
        _check_hostname(self.tls_hostname, self.tls)

    def trust(self) -> Trust | None:
        """Load our certificate and the trusted authority if `tls` is set. Raises UsageError."""
        return _trust(self.tls, self.tls_hostname)

    @property
    def release_after(self) -> int:
        """Number of written base pages at which the write trace unprotects a huge page; 0 if it never does."""
        return {"4K": 0, "2M": 1, "auto": AUTO_RELEASE}[self.trace_granularity]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverOptions:
    """Options of a recovery, with the meaning that they have for a migration. Raises UsageError."""

    timeout: Annotated[float, TIMEOUT] = 30.0
    """Fail when the peer has been silent for this time."""
    tls: Annotated[str | os.PathLike[str] | None, PathName(metavar="DIR")] = None
    """Directory of certificates, as for the migration."""
    tls_hostname: str | None = None
    """Name to expect in the receiver's certificate; None for the name that the migration was sent to."""
    insecure: bool = False
    """Allow unencrypted connections to addresses other than loopback."""

    def __post_init__(self) -> None:
        check(self)
        _check_hostname(self.tls_hostname, self.tls)

    def trust(self, hostname: str) -> Trust | None:
        """Load the certificates if `tls` is set. `hostname`: name expected by the migration, the default of
        `tls_hostname`. Raises UsageError."""
        return _trust(self.tls, self.tls_hostname or hostname)


def _trust(tls: str | os.PathLike[str] | None, hostname: str | None) -> Trust | None:
    if tls is None:
        return None
    from pageferry.migration.transport.tls import Trust

    return Trust(Path(tls), "source", hostname=hostname)


def _check_hostname(hostname: str | None, tls: str | os.PathLike[str] | None) -> None:
    if hostname is not None and tls is None:
        raise UsageError(
            "`tls_hostname` requires `tls`: without certificates there is no name to compare; remove `tls_hostname`, "
            "or add `tls`"
        )
