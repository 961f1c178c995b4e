"""How a restore looks to a person: a bar while memory arrives, and a table at the end."""

from __future__ import annotations

import msgspec
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pageferry.checkpoints.restore_events import EagerEvent, ProgressEvent, RestoreResult, RunningEvent, TouchedEvent
from pageferry.report.text import PlainView, named_values
from pageferry.report.units import duration, ms, size

BAR = 32
"""Columns of the bar."""


class RestoreView(PlainView):
    """Shows events of `pageferry.checkpoints.restore_events`."""

    def __init__(self) -> None:
        self._most = 1
        self._told: set[str] = set()

    def line(self, event: msgspec.Struct) -> str | None:
        """A line when it runs, and one for each page that cannot be had."""
        match event:
            case RunningEvent():
                ran = duration(event.time_to_running / 1e3)
                state = "is paused, as it was saved," if event.paused else "runs"
                return f"{event.workload} {state} after {ran}; {size(event.deferred)} are still to come"
            case ProgressEvent():
                new = [failure for failure in event.failures if failure not in self._told]
                self._told.update(new)
                return "\n".join(f"warning: {failure}" for failure in new) or None
            case EagerEvent():
                return f"loading all {size(event.length)} of {event.image} first, not on demand: {event.reason}"
            case TouchedEvent():
                return None
            case _:
                return super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """A bar of what has arrived."""
        if not isinstance(event, ProgressEvent):
            return self.line(event)
        self._most = max(self._most, event.deferred)
        bar = ProgressBar(total=self._most, completed=self._most - event.deferred, width=BAR)
        row = Table.grid(padding=(0, 1))
        row.add_row(bar, Text(f"{size(event.deferred)} to come, {event.faults} faults"))
        lines = Table.grid()
        lines.add_row(row)
        for failure in event.failures:
            lines.add_row(Text(failure, style="bold red"))
        return lines

    def result(self, result: msgspec.Struct) -> RenderableType:
        """The end of a restore as a table."""
        if not isinstance(result, RestoreResult):
            return super().result(result)
        return named_values(_rows(result))


def _rows(result: RestoreResult) -> list[tuple[str, str]]:
    parts = result.time_parts
    filled = f"load {ms(parts.load)}, " if result.eager_reason is not None else ""
    ran = (
        f"{ms(result.time_to_running)}: adopt {ms(parts.adopt)}, {filled}state {ms(parts.device_state)}, "
        f"resume {ms(parts.resume)}; QEMU's start {ms(parts.qemu_start)}, the image {ms(parts.open_image)} meanwhile"
    )
    state = f"{size(result.deferred)} to come" if result.status == "active" else "all memory is there"
    times = result.service_times
    faults = (
        f"{result.faults}, {result.missed} of them to missing pages; {result.service_us:.0f} us each, "
        f"99 of 100 within {duration(times.p99_us / 1e6)}, the longest {duration(times.longest_us / 1e6)}"
    )
    rows = [("loaded before it ran", result.eager_reason)] if result.eager_reason is not None else []
    return [
        ("restore", f"{result.workload} {'is paused, as it was saved' if result.paused else 'runs'}, {state}"),
        *rows,
        ("time to running" if not result.paused else "time to ready", ran),
        ("faults", faults),
        ("read", f"{size(result.bytes_read)} of {result.image}; {result.prefetched} pages before they were asked for"),
    ]
