"""Output of verbs that describe workloads: `list`, `run` and `adopt`."""

from __future__ import annotations

import msgspec
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.events import Event
from pageferry.report.text import PlainView
from pageferry.report.units import size


class WorkloadInfo(Event, frozen=True, kw_only=True, tag="workload"):
    """Description of a workload."""

    name: str
    kind: str
    """`qemu` or `arena`."""
    pid: int
    """Process id in the PID namespace in which the workload was started."""
    status: str
    """`running`, `paused`, `committed` (the destination may own it), `moved`; `busy`: in use by another command;
    `unknown`: started in another PID namespace, and not accessible from this one.
    """
    reason: str | None = None
    """Reason why it is paused, unless its user has paused it."""
    memory: int | None
    """Size of the memory, bytes; None if it is busy or unknown."""
    resident: int | None
    """Allocated bytes of the memory, mapped or not; None if it is busy or unknown."""
    deferred: int = 0
    """Deferred bytes, to be loaded from an image or fetched from another host."""
    waiting: str | None = None
    """Reason why deferred bytes are not loaded: no pager, no connection, or unreadable pages."""


class Listing(Event, frozen=True, tag="workloads"):
    """All workloads of a host."""

    workloads: list[WorkloadInfo]


class WorkloadsView(PlainView):
    """View as a table with one row per workload."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the table of a `Listing` or of a single `WorkloadInfo`."""
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
