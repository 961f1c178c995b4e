"""Requests to a pager and their replies: one JSON object a line each way, over the socket in the workload's folder."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.events import Event
from pageferry.images.metadata import ImageIdentity

MAX_TOUCHED = 16384
"""Windows in one answer."""


class PagerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A question to a pager. `ensure` is answered when the pages are there, `settle` when nothing traps any more.

    `hold` is answered by `HoldGiven`, and holds until `release`, or until the connection is closed.
    """

    what: Literal["status", "touched", "ensure", "settle", "hold", "release", "stop"]
    region: int = 0
    first: int = 0
    """Page of the region; of `touched`, the number of windows that are known already."""
    count: int = 0
    """Pages of the region."""


class HoldGiven(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `hold`."""

    pager: int
    """Pid of the pager's process."""
    userfaults: dict[int, int] | None = None
    """Process of the workload -> number of its userfaultfd, in the pager's process. None: it is not held, because it
    cannot be, because everything is there, or because it is `busy`."""
    large: list[bytes] = []
    """Per region, a byte for each 2 MiB unit: 1 where it will stand on a large page."""
    busy: bool = False
    """Somebody else holds it."""


class PagerStatus(Event, frozen=True, kw_only=True, tag="pager"):
    """The answer to every other question."""

    image: str
    pager: int
    """Pid of the pager's process."""
    identity: ImageIdentity | None = None
    """Identity of the image; None where contents come from a peer."""
    deferred: int
    """Bytes whose contents are still to come."""
    finished: bool
    """Everything is there, and nothing traps any more."""
    faults: int
    missed: int
    loaded: int
    prefetched: int
    bytes_read: int
    service: float
    """Seconds spent on all faults together."""
    longest: float
    histogram: list[int]
    """Faults by time of service: number k of those that took less than 2^k us, and 2^(k-1) us or more."""
    failures: list[str]
    """Pages that cannot be had: what is wrong, and where."""
    accessed: int
    """How many of these the workload waits for."""
    touched: list[int] = msgspec.field(default_factory=list)
    """The answer to `touched`: further windows of 16 pages in the order of their first fault."""
    flags: str = ""
    """Where the pager's flags are, if not in the workload's folder: those of a program that restores its own arena."""
    paused: str | None = None
    """Why nothing comes: the link to the source has gone."""
    error: str | None = None
    """Why what was asked for could not be done."""

    @property
    def waiting(self) -> str | None:
        """Why contents do not come, in a line: the link is gone, or a page cannot be had. None: they do."""
        return self.paused or next(iter(self.failures), None)
