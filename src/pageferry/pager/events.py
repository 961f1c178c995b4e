"""Result of `pageferry restore --takeover`."""

from __future__ import annotations

from pageferry.events import Event


class TakenOver(Event, frozen=True, kw_only=True, tag="pager"):
    """Another pager serves the deferred memory of a workload."""

    workload: str
    image: str
    """Path of the image."""
    pager: int
    """Process id of the pager."""
    deferred: int
    """Deferred memory, bytes."""
    failures: list[str]
    """Pages that cannot be read, with the cause."""
