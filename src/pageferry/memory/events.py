"""Result of `pageferry peek`."""

from __future__ import annotations

from pageferry.events import Event


class Peeked(Event, frozen=True, kw_only=True, tag="memory"):
    """Contents of a range of memory."""

    workload: str
    region: str
    offset: int
    length: int
    data: str
    """Contents in hexadecimal."""
