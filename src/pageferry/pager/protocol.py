"""Requests to a pager and their replies: one JSON object per line, over the socket in the workload's directory."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.images.metadata import ImageIdentity

MAX_TOUCHED = 16384
"""Maximum number of windows in a reply."""


class PagerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Request to a pager. The reply to `ensure` is sent when the pages are present, the reply to `settle` when no
    userfaultfd covers the workload.

    The reply to `hold` is `HoldGiven`. The pager stays acquired until `release`, or until the connection is closed.
    """

    what: Literal["status", "touched", "ensure", "settle", "hold", "release", "stop"]
    region: int = 0
    first: int = 0
    """First page in the region; for `touched`, the number of windows that the client has already received."""
    count: int = 0
    """Number of pages."""


class HoldGiven(msgspec.Struct, frozen=True, kw_only=True):
    """Reply to `hold`."""

    pager: int
    """Process id of the pager."""
    userfaults: dict[int, int] | None = None
    """Numbers of the userfaultfds in the pager's process, by pid of the workload's processes. None if the pager was not
    acquired, because acquisition is not supported, no page is deferred, or the pager is `busy`."""
    large: list[bytes] = []
    """Per region, one byte per 2 MiB unit: 1 if the unit will be backed by a huge page."""
    busy: bool = False
    """Whether another client has acquired the pager."""


class PagerStatus(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Reply to every request except `hold`, and to a `hold` that failed."""

    image: str
    pager: int
    """Process id of the pager."""
    identity: ImageIdentity | None = None
    """Identity of the image; None if contents are fetched from a peer."""
    deferred: int
    """Deferred memory, bytes."""
    finished: bool
    """Whether nothing is deferred, and no userfaultfd covers the workload."""
    faults: int
    missed: int
    loaded: int
    prefetched: int
    bytes_read: int
    service: float
    """Total service time of all faults, seconds."""
    longest: float
    """Longest service time of a fault, seconds."""
    histogram: list[int]
    """Histogram of the service times: bin k counts those of at least 2^(k-1) us and less than 2^k us."""
    failures: list[str]
    """Pages that cannot be read, with the cause."""
    accessed: int
    """Number of unreadable pages that the workload waits for."""
    touched: list[int] = msgspec.field(default_factory=list)
    """Touched windows of 16 pages, in the order of their first fault. The reply to `touched` contains those from window
    `first` on; the summary of the pager contains the first ones, up to 8 GiB."""
    flags: str = ""
    """Path of the deferred bitmap of a program that restores its own arena; empty if the bitmap is in the workload's
    directory."""
    paused: str | None = None
    """Reason why no pages are received: the link to the source was lost. None if pages can be received."""
    error: str | None = None
    """Reason why the request failed; None if it succeeded."""

    @property
    def stall_reason(self) -> str | None:
        """Reason why pages are not loaded: a lost link, or a page that cannot be read. None if pages are loaded."""
        return self.paused or next(iter(self.failures), None)
