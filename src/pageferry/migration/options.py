"""What can be chosen about a migration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pageferry import values
from pageferry.errors import UsageError
from pageferry.migration.messages import MAX_STREAMS, Codec, Mode, Populate
from pageferry.migration.trust import Trust

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
"""`auto` releases a large page once so many of its 512 traces have fired. At half, no more than twice what was written
is sent; lower lines help fast writers, and can keep a migration from converging (docs/benchmarks.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a migration, as `pageferry migrate` has them.

    Durations, sizes and rates are numbers in the unit of the field, or texts such as `30ms` and `100M`. Raises
    UsageError.
    """

    mode: Mode = "precopy"
    """Which pages are there before the workload runs at the destination: all (`precopy`), none (`postcopy`: they come
    on access), or all until copying gets no further, then the rest on access (`hybrid`)."""
    max_downtime: float = 0.3
    """Seconds that the last pages may take while the workload is paused (S2)."""
    max_rounds: int = 30
    """Give up after so many rounds without reaching `max_downtime`."""
    auto_converge: bool = False
    """Take CPU time from the workload, in steps, where rounds get no further: a pre-copy that would give up ends."""
    trace_granularity: Granularity = "auto"
    """Unit of the write trace (S2): every small page, whole large pages, or as the workload writes."""
    large_pages: LargePages = "keep"
    """Whether a large page of the source must be one at the destination (S6, S7)."""
    populate: Populate = "all"
    """Which page-table entries are made before the workload resumes: of all pages, during transmission (S5); of the
    pages modified during the migration (S1); or none."""
    codec: Codec = "none"
    """Compression of page blocks."""
    adaptive: bool = False
    """Leave the codec out while the link is faster than it."""
    bandwidth: int = 0
    """Most bytes per second, over all page streams together; 0: no limit."""
    streams: int = 1
    """Parallel page streams."""
    timeout: float = 30.0
    """Seconds of silence after which the peer counts as lost."""
    insecure: bool = False
    """Allow addresses other than loopback, in the clear."""
    tls: str | os.PathLike[str] | None = None
    """Folder of certificates (`trust.Trust`): everything goes under TLS, between hosts that have shown who they are."""
    tls_hostname: str | None = None
    """The name that the receiver's certificate must have; None for the host of its address."""

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
            raise UsageError(f"`auto_converge` is for pre-copy: with `mode` {self.mode} it ends whatever is modified")
        if self.tls_hostname is not None and self.tls is None:
            raise UsageError("`tls_hostname` needs `tls`: without certificates there is no name to compare")

    def trust(self) -> Trust | None:
        """Who we are and who is believed, if `tls` says so. Raises UsageError."""
        if self.tls is None:
            return None
        return Trust(Path(self.tls), "source", hostname=self.tls_hostname)

    @property
    def release_after(self) -> int:
        """The trace's `release_after` for the granularity chosen."""
        return {"4K": 0, "2M": 1, "auto": AUTO_RELEASE}[self.trace_granularity]


def timeout(value: object) -> float:
    """Seconds of silence after which a peer counts as lost. Raises UsageError."""
    return values.duration("timeout", value, 0.1, 3600.0)
