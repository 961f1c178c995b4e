"""Human-readable output of a restore: a progress bar while memory is loaded, and a table of the result."""

from __future__ import annotations

import msgspec
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pageferry.checkpoints.events import EagerEvent, ProgressEvent, RestoreResult, RunningEvent, TouchedEvent
from pageferry.pager.events import TakenOver
from pageferry.report.text import PlainView, named_values
from pageferry.report.units import duration, ms, size, us

BAR = 32
"""Width of the progress bar, columns."""


class RestoreView(PlainView):
    """View of the events and the result of a restore."""

    def __init__(self) -> None:
        self._most = 1
        self._reported: set[str] = set()

    def line(self, event: msgspec.Struct) -> str | None:
        """Return a line when the guest runs, and a line for each page that cannot be loaded."""
        match event:
            case RunningEvent():
                ran, state = duration(event.time_to_running / 1e3), _run_state(event)
                state += "," if "," in state else ""
                return f"{event.workload}: {state} after {ran}; {size(event.deferred)} deferred"
            case ProgressEvent():
                new = [failure for failure in event.failures if failure not in self._reported]
                self._reported.update(new)
                return "\n".join(f"warning: {failure}" for failure in new) or None
            case EagerEvent():
                return f"loading all {size(event.length)} of {event.image} first, not on demand: {event.reason}"
            case TouchedEvent():
                return None
            case _:
                return super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return a progress bar of the loaded memory, or the line of another event."""
        if not isinstance(event, ProgressEvent):
            return self.line(event)
        self._most = max(self._most, event.deferred)
        bar = ProgressBar(total=self._most, completed=self._most - event.deferred, width=BAR)
        row = Table.grid(padding=(0, 1))
        row.add_row(bar, Text(f"{size(event.deferred)} deferred, {event.faults:,} faults"))
        lines = Table.grid()
        lines.add_row(row)
        for failure in event.failures:
            lines.add_row(Text(failure, style="bold red"))
        return lines

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the result of a restore as a table, and the result of a takeover as lines."""
        match result:
            case RestoreResult():
                return named_values(_rows(result))
            case TakenOver():
                state = f"{size(result.deferred)} deferred, loaded from {result.image} by process {result.pager}"
                return Text("\n".join([f"{result.workload}: {state}", *result.failures]))
            case _:
                return super().result(result)


def _run_state(restored: RunningEvent | RestoreResult) -> str:
    if restored.paused:
        return "paused, as it was saved" if restored.was_paused else "paused, as requested"
    return "running, although it was saved paused" if restored.was_paused else "running"


def _rows(result: RestoreResult) -> list[tuple[str, str]]:
    parts = result.time_parts
    filled = f"load {ms(parts.load)}, " if result.eager_reason is not None else ""
    ran = (
        f"{ms(result.time_to_running)}: adopt {ms(parts.adopt)}, {filled}state {ms(parts.device_state)}, "
        f"resume {ms(parts.resume)}; not counted: start of QEMU {ms(parts.qemu_start)}, during which the image was "
        f"opened ({ms(parts.open_image)})"
    )
    state = f"{size(result.deferred)} deferred" if result.status == "active" else "all memory loaded"
    times = result.service_times
    faults = (
        f"{result.faults:,}, of which {result.missed:,} on deferred pages; mean {us(result.service_us)}, "
        f"p99 {us(times.p99_us)}, maximum {us(times.longest_us)}"
    )
    rows = [("loaded in advance", result.eager_reason)] if result.eager_reason is not None else []
    return [
        ("restore", f"{result.workload} {_run_state(result)}, {state}"),
        *rows,
        ("time to running" if not result.paused else "time to ready", ran),
        ("faults", faults),
        ("read", f"{size(result.bytes_read)} of {result.image}; {result.prefetched:,} pages prefetched"),
    ]
