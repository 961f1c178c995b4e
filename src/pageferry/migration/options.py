"""Options of a migration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pageferry import values
from pageferry.errors import UsageError
from pageferry.migration.transport.messages import MAX_STREAMS, Codec, Mode, Populate
from pageferry.migration.transport.tls import Trust

Granularity = Literal["4K", "2M", "auto"]
LargePages = Literal["keep", "ignore"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": get_args(Mode),
    "trace_granularity": get_args(Granularity),
    "large_pages": get_args(LargePages),
    "populate": get_args(Populate),
    "codec": get_args(Codec),
}

AUTO_RELEASE = 256
"""`auto` releases a huge page once this many of its 512 traces have fired. At half, at most twice the written memory is
sent; lower values help fast writers, but can keep a migration from converging (docs/benchmarks.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a migration, as those of `pageferry migrate`.

    Durations, sizes and rates are numbers in the unit of the field, or strings such as `30ms` and `100M`. Raises
    UsageError.
    """

    mode: Mode = "precopy"
    """Pages that are present before the workload runs at the destination: all (`precopy`); none, they are fetched on
    demand (`postcopy`); or all that were sent until the rounds stopped converging, the others on demand (`hybrid`)."""
    max_downtime: float = 0.3
    """Maximum time for sending the last pages while the workload is paused, seconds (S2)."""
    max_rounds: int = 30
    """Maximum number of rounds; the migration fails if they do not reach `max_downtime`."""
    auto_converge: bool = False
    """Withhold CPU time from the workload, in steps, while rounds do not converge, so that pre-copy completes."""
    trace_granularity: Granularity = "auto"
    """Unit of the write trace (S2): base pages, huge pages, or adapted to the workload's writes."""
    large_pages: LargePages = "keep"
    """Whether to back memory by huge pages at the destination where the source does (S6, S7)."""
    populate: Populate = "all"
    """Page-table entries to populate before the workload resumes: of all pages, during the transfer (S5); of the pages
    modified during the migration (S1); or none."""
    codec: Codec = "none"
    """Compression of storage blocks."""
    adaptive: bool = False
    """Send uncompressed while the link is faster than the codec."""
    bandwidth: int = 0
    """Limit for all page streams together, bytes per second; 0 for none."""
    streams: int = 1
    """Number of parallel page streams."""
    timeout: float = 30.0
    """Seconds of silence after which the peer counts as lost."""
    insecure: bool = False
    """Allow addresses other than loopback without encryption."""
    tls: str | os.PathLike[str] | None = None
    """Directory of certificates (`tls.Trust`): use TLS with mutual authentication."""
    tls_hostname: str | None = None
    """Host name expected in the receiver's certificate; None for the host of its address."""

    def __post_init__(self) -> None:
        checked = {
            "max_downtime": values.duration("max_downtime", self.max_downtime, 0.0, 3600.0),
            "max_rounds": values.count("max_rounds", self.max_rounds, 1, 10_000),
            "bandwidth": values.rate("bandwidth", self.bandwidth),
            "streams": values.count("streams", self.streams, 1, MAX_STREAMS),
            "timeout": timeout(self.timeout),
            "tls": values.optional(values.path, "tls", self.tls),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name in ("auto_converge", "adaptive", "insecure"):
            values.flag(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            values.choice(name, getattr(self, name), choices)
        values.optional(values.text, "tls_hostname", self.tls_hostname)
        if self.auto_converge and self.mode != "precopy":
            raise UsageError(f"`auto_converge` requires `mode` precopy: {self.mode} ends at any dirty rate")
        if self.tls_hostname is not None and self.tls is None:
            raise UsageError("`tls_hostname` requires `tls`: without certificates there is no name to compare")

    def trust(self) -> Trust | None:
        """Load our certificate and the trusted authority if `tls` is set. Raises UsageError."""
        if self.tls is None:
            return None
        return Trust(Path(self.tls), "source", hostname=self.tls_hostname)

    @property
    def release_after(self) -> int:
        """Value of the trace's `release_after` for the granularity: fired traces after which a huge page is released; 0
        for never."""
        return {"4K": 0, "2M": 1, "auto": AUTO_RELEASE}[self.trace_granularity]


def timeout(value: object) -> float:
    """Check a timeout: seconds of silence after which a peer counts as lost. Raises UsageError."""
    return values.duration("timeout", value, 0.1, 3600.0)
