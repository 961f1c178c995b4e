"""Output of verbs that describe workloads: `list`, `run` and `adopt`."""

from __future__ import annotations

import msgspec
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.report.text import PlainView
from pageferry.report.units import size
from pageferry.workloads.events import Listing, WorkloadInfo


class WorkloadsView(PlainView):
    """View of workloads as a table with one row per workload."""

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
            for note in (one.reason, one.stall_reason):
                if note is not None:
                    table.add_row("", "", "", Text(note, style="bold red"))
        return table


def _size(count: int | None) -> str:
    return "-" if count is None else size(count)
