"""Human-readable output of a checkpoint: a progress bar, and a table of the result."""

from __future__ import annotations

import msgspec
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pageferry.checkpoints.events import ArmedEvent, CheckpointResult, InstantEvent, SavedDiskSummary, SavingEvent
from pageferry.report.disks import progress_of
from pageferry.report.text import PlainView, named_values
from pageferry.report.units import ms, rate, size, us
from pageferry.stores.events import StoreProgress
from pageferry.workloads.events import DisksProgress

BAR = 32
"""Width of the progress bar, columns."""


class CheckpointView(PlainView):
    """View of the events and the result of a checkpoint."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def line(self, event: msgspec.Struct) -> str | None:
        """Return a line for an event that ends a step; None for progress."""
        match event:
            case ArmedEvent():
                return (
                    f"{size(event.present)} of {size(event.memory)} present, {event.large_pages} huge pages, "
                    f"write-protected in {ms(event.arm_ms)}"
                )
            case InstantEvent():
                if event.paused:
                    return f"state saved in {ms(event.downtime)}; saving memory of the paused workload"
                return f"paused for {ms(event.downtime)}; saving memory of the running workload"
            case SavingEvent() | DisksProgress() | StoreProgress():
                return None
            case _:
                return super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return the completed steps, and a progress bar for the current one."""
        lines = Table.grid()
        if (line := self.line(event)) is not None:
            self._lines.append(line)
        for done in self._lines:
            lines.add_row(Text(done))
        if isinstance(event, SavingEvent):
            row = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=max(event.total, 1), completed=event.done, width=BAR)
            row.add_row(bar, Text(f"{size(event.stored)} written, {event.traps:,} traps"))
            lines.add_row(row)
        if isinstance(event, DisksProgress):
            lines.add_row(progress_of(event))
        if isinstance(event, StoreProgress):
            lines.add_row(Text(f"{event.image}: {size(event.done)} uploaded"))
        return lines

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the result as a table."""
        if not isinstance(result, CheckpointResult):
            return super().result(result)
        return named_values(_rows(result))


def _rows(result: CheckpointResult) -> list[tuple[str, str]]:
    parts, pages, traps = result.downtime_parts, result.pages, result.trap_details
    saving = f", save {ms(parts.save)}" if result.mode == "stop" else f", protect {ms(parts.protect)}"
    disks = f", disks {ms(parts.disks)}" if result.disks else ""
    downtime = f"stop {ms(parts.stop)}{disks}, state {ms(parts.device_state)}{saving}, resume {ms(parts.resume)}"
    parent = f", {pages.in_parent:,} identical to {result.parent}" if result.parent else ""
    speed = rate(result.memory / max(result.total_time / 1e3, 1e-9))
    classes = (
        f"{pages.data:,} stored, {pages.same_as:,} duplicate, {pages.zero:,} zero, {pages.pattern:,} pattern, "
        f"{pages.absent:,} not present{parent}"
    )
    written = f"{size(result.bytes_written)} in {result.writes:,} writes of {size(result.mean_write)}"
    rows = [
        ("checkpoint", f"{result.workload} {result.status}, in {result.image}{', paused' if result.paused else ''}"),
        ("total time", f"{ms(result.total_time)} for {size(result.memory)} ({speed})"),
        ("downtime", f"{ms(result.downtime)}: {downtime}"),
        ("pages", classes),
        ("image", f"{written}; stored pages compressed {result.compression:.2f}:1 ({result.codec})"),
    ]
    rows += [("disk", _disk(disk)) for disk in result.disks]
    if result.upload is not None:
        rows.append(("upload", f"{size(result.upload.uploaded)}; spool of up to {size(result.upload.spool)}"))
    if result.parent is not None:
        rows.append(("changes", _changes(result)))
    if result.traps:
        waits = f", {traps.staging_waits} waited for staging space" if traps.staging_waits else ""
        rows.append(("traps", f"{result.traps:,}, mean {us(traps.mean_us)}, maximum {us(traps.longest_us)}{waits}"))
    return rows


def _disk(disk: SavedDiskSummary) -> str:
    if disk.overlay is None:
        return f"{disk.name}: copied to {disk.path}"
    return f"{disk.name}: {disk.path} is frozen; the guest writes to {disk.overlay}"


def _changes(result: CheckpointResult) -> str:
    if result.tracking == "trace":
        return f"found by the write trace since the parent: {result.written:,} pages, saved in {result.rounds} rounds"
    if result.tracking == "private":
        note = f": {result.tracking_note}" if result.tracking_note else ""
        return f"the private pages of the clone; rounds before the pause: {result.rounds}{note}"
    return f"found by comparing all pages: {result.tracking_note}"
