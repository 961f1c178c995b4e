"""How a checkpoint looks to a person: a bar while pages are saved, and a table at the end."""

from __future__ import annotations

import msgspec
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pageferry.checkpoints.events import ArmedEvent, CheckpointResult, InstantEvent, SavingEvent
from pageferry.report.text import PlainView, named_values
from pageferry.report.units import ms, rate, size

BAR = 32
"""Columns of the bar."""


class CheckpointView(PlainView):
    """Shows events of `pageferry.checkpoints.events`."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def line(self, event: msgspec.Struct) -> str | None:
        """A line per step; nothing for mere progress."""
        match event:
            case ArmedEvent():
                return (
                    f"{size(event.present)} of {size(event.memory)} in memory, {event.large_pages} large pages, "
                    f"protected in {ms(event.arm_ms)}"
                )
            case InstantEvent():
                if event.paused:
                    return f"state saved in {ms(event.downtime)}; saving memory while it stays paused"
                return f"paused for {ms(event.downtime)}; saving while it runs"
            case SavingEvent():
                return None
            case _:
                return super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """The steps so far, and a bar for what is under way."""
        lines = Table.grid()
        if (line := self.line(event)) is not None:
            self._lines.append(line)
        for done in self._lines:
            lines.add_row(Text(done))
        if isinstance(event, SavingEvent):
            row = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=max(event.total, 1), completed=event.done, width=BAR)
            row.add_row(bar, Text(f"{size(event.stored)} written, {event.traps} traps"))
            lines.add_row(row)
        return lines

    def result(self, result: msgspec.Struct) -> RenderableType:
        """The end of a checkpoint as a table."""
        if not isinstance(result, CheckpointResult):
            return super().result(result)
        return named_values(_rows(result))


def _rows(result: CheckpointResult) -> list[tuple[str, str]]:
    parts, pages, traps = result.downtime_parts, result.pages, result.trap_details
    saving = f", saving {ms(parts.save)}" if result.mode == "stop" else f", protecting {ms(parts.protect)}"
    downtime = f"stop {ms(parts.stop)}, state {ms(parts.device_state)}{saving}, resume {ms(parts.resume)}"
    parent = f", {pages.in_parent} as in {result.parent}" if result.parent else ""
    speed = rate(result.memory / max(result.total_time / 1e3, 1e-9))
    classes = (
        f"{pages.data} stored, {pages.same_as} repeated, {pages.zero} of zeros, {pages.pattern} of one word, "
        f"{pages.absent} not in memory{parent}"
    )
    written = f"{size(result.bytes_written)} in {result.writes} writes of {size(result.mean_write)}"
    rows = [
        ("checkpoint", f"{result.workload} {result.status}, in {result.image}{', paused' if result.paused else ''}"),
        ("total time", f"{ms(result.total_time)} for {size(result.memory)} ({speed})"),
        ("downtime", f"{ms(result.downtime)}: {downtime}"),
        ("pages", classes),
        ("image", f"{written}; data {result.compression:.2f}:1 by {result.codec}"),
    ]
    if result.parent is not None:
        rows.append(("changes", _changes(result)))
    if result.traps:
        waits = f", {traps.staging_waits} waited for room" if traps.staging_waits else ""
        rows.append(("traps", f"{result.traps}, mean {traps.mean_us:.0f} us, longest {traps.longest_us:.0f} us{waits}"))
    return rows


def _changes(result: CheckpointResult) -> str:
    if result.tracking == "trace":
        return f"found by the trace since the parent: {result.written} pages written, {result.rounds} rounds"
    return f"found by comparing all pages: {result.tracking_note}"
