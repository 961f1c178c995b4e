"""How sharing looks to a person: the classes, the curve, and what was freed."""

from __future__ import annotations

import msgspec
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pageferry.report.figures.base import thinned
from pageferry.report.text import PlainView
from pageferry.report.units import duration, rate, size
from pageferry.sharing.events import ApplyEvent, ScanEvent, SharingResult

BAR = 32
"""Columns of a bar."""
SHOWN = 9
"""Points of the curve in the table."""
TITLES = {
    "zero": "zeros",
    "pattern": "one pattern",
    "inside": "equal within a workload",
    "across": "equal between workloads",
}


class SharingView(PlainView):
    """Shows events and results of `pageferry.sharing.events`."""

    def line(self, event: msgspec.Struct) -> str | None:
        """A line per step and per result of a watch; nothing for mere progress."""
        match event:
            case ScanEvent():
                return None
            case ApplyEvent():
                return f"{event.step}: {event.detail}"
            case SharingResult():
                return _summary(event)
            case _:
                return super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """A bar while pages are looked at."""
        if not isinstance(event, ScanEvent):
            return self.line(event)
        bar = Table.grid(padding=(0, 1))
        done = f"{size(event.done)} of {size(event.total)}"
        bar.add_row("looking", ProgressBar(total=max(event.total, 1), completed=event.done, width=BAR), done)
        return bar

    def result(self, result: msgspec.Struct) -> RenderableType:
        """The estimate as tables, and what was done."""
        if not isinstance(result, SharingResult):
            return super().result(result)
        parts: list[RenderableType] = [_classes(result), Text(), _curve(result), Text(), Text(_how(result))]
        parts += [Text(f"note: {note}", style="dim") for note in result.not_shareable]
        if result.freed is not None:
            parts += [Text(), Text(_done(result), style="bold")]
        return Group(*parts)


def _classes(result: SharingResult) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("pages of")
    for title in ("found", "reclaimable"):
        table.add_column(title, justify="right")
    for name, found in result.classes.items():
        table.add_row(TITLES[name], size(found.pages * 4096), size(found.reclaimable))
    table.add_row("all", "", size(result.reclaimable), style="bold")
    return table


def _curve(result: SharingResult) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("large pages broken", "reclaimable", "possible here"):
        table.add_column(title, justify="right")
    table.add_column("")
    most = max(result.reclaimable, 1)
    for point in thinned(result.curve, SHOWN):
        bar = "█" * round(BAR * point.reclaimable / most)
        table.add_row(str(point.large_pages), size(point.reclaimable), size(point.possible), bar)
    return table


def _how(result: SharingResult) -> str:
    scan = result.scan
    speed = rate(scan.looked_at / max(scan.ms / 1e3, 1e-9))
    sampled = "" if scan.every == 1 else f", one of {scan.every} large pages"
    scaled = "" if scan.scale == 1 else f", one of {scan.scale} contents kept in mind"
    coming = "" if not result.deferred else f"{size(result.deferred)} still to come (known by signatures, not loaded), "
    return (
        f"{size(result.memory)} in memory, {coming}{result.large_pages} large pages, {size(result.already_shared)} "
        f"shared already; looked at {size(scan.looked_at)} in {duration(scan.ms / 1e3)} ({speed}{sampled}{scaled})"
    )


def _done(result: SharingResult) -> str:
    words = (
        f"freed {size(result.freed or 0)} (estimate {size(result.estimated or 0)}), {result.large_pages_broken} large "
        f"pages broken of {result.large_pages_chosen} chosen, each with {result.threshold} shareable pages or more"
    )
    if result.ksm_scans:
        words += f"; {result.ksm_scans} scans of KSM, {duration((result.ksm_cpu_ms or 0) / 1e3)} of CPU"
    if result.pauses:
        words += f"; {result.pauses} pauses of at most {duration((result.longest_pause_ms or 0) / 1e3)}"
    return words


def _summary(result: SharingResult) -> str:
    words = f"{size(result.reclaimable)} reclaimable of {size(result.memory)}, {size(result.possible)} here"
    return words if result.freed is None else f"{words}; {_done(result)}"
