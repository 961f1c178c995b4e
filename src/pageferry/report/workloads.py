"""What `pageferry list` and its like say about workloads."""

from __future__ import annotations

import msgspec
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.events import Event
from pageferry.report.text import PlainView
from pageferry.report.units import size


class WorkloadInfo(Event, frozen=True, kw_only=True, tag="workload"):
    """One workload at one moment."""

    name: str
    kind: str
    """`qemu` or `arena`."""
    pid: int
    """In the PID namespace in which it was started."""
    status: str
    """`running`, `paused`, `committed` (it may be running elsewhere), `moved`; `busy`: another command works on it;
    `unknown`: it was started in another PID namespace, and cannot be worked on from this one.
    """
    reason: str | None = None
    """Why it is paused, where its user did not pause it."""
    memory: int | None
    """Bytes; None while it is busy or unknown."""
    resident: int | None
    """Bytes of the memory that are allocated, mapped or not; None while it is busy or unknown."""
    deferred: int = 0
    """Bytes whose contents are still to come, from an image or another host."""
    waiting: str | None = None
    """Why they do not come: a pager or a link that is gone, or pages that cannot be had."""


class Listing(Event, frozen=True, tag="workloads"):
    """All workloads of a host."""

    workloads: list[WorkloadInfo]


class WorkloadsView(PlainView):
    """A table, one line a workload."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """The table of a `Listing`, or of a single `WorkloadInfo`."""
        workloads = result.workloads if isinstance(result, Listing) else [result]
        table = Table("NAME", "KIND", "PID", "STATUS", "MEMORY", "RESIDENT", "DEFERRED", box=None, pad_edge=False)
        for column in (2, 4, 5, 6):
            table.columns[column].justify = "right"
        for one in workloads:
            assert isinstance(one, WorkloadInfo)
            sizes = (_size(one.memory), _size(one.resident), size(one.deferred) if one.deferred else "-")
            table.add_row(one.name, one.kind, str(one.pid), one.status, *sizes)
            for note in (one.reason, one.waiting):
                if note is not None:
                    table.add_row("", "", "", Text(note, style="bold red"))
        return table


def _size(count: int | None) -> str:
    return "-" if count is None else size(count)
