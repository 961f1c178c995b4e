"""Human-readable output of `pageferry clone`: a line when a guest runs, and a table of all guests."""

from __future__ import annotations

import msgspec
from rich.console import RenderableType

from pageferry.checkpoints.events import CloneResult, RunningEvent
from pageferry.report.tables import table, with_notes
from pageferry.report.text import PlainView
from pageferry.report.units import duration, ms, size


class CloneView(PlainView):
    """View of the events and the result of clones."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return a line when a guest runs."""
        if isinstance(event, RunningEvent):
            return f"{event.workload}: running after {duration(event.time_to_running / 1e3)}"
        return None

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return the line of an event."""
        return self.line(event)

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return a table with one row per guest."""
        if not isinstance(result, CloneResult):
            return super().result(result)
        rows = table(("NAME", "PID", "RUNNING AFTER", "PRIVATE"), right=("PID", "RUNNING AFTER", "PRIVATE"))
        for one in result.clones:
            private = "-" if one.private is None else size(one.private)
            rows.add_row(one.name, str(one.pid), ms(one.time_to_running), private)
        total = f"{len(result.clones)} guests run after {duration(result.time_to_all_running / 1e3)}"
        return with_notes(rows, [(result.image, total)], style="")
