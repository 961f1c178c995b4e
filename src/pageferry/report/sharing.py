"""Human-readable output of `pageferry sharing`: classes of duplicate pages, curve of freed memory, and results of
merging."""

from __future__ import annotations

import msgspec
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pageferry.report.figures.base import thinned
from pageferry.report.tables import narrow, note
from pageferry.report.text import PlainView
from pageferry.report.units import duration, rate, size
from pageferry.sharing.events import ApplyEvent, ScanEvent, SharingResult

BAR = 32
"""Width of a bar, columns."""
SHOWN = 9
"""Maximum number of points of the curve in the table."""
TITLES = {
    "zero": "zero pages",
    "pattern": "one pattern",
    "inside": "duplicates within a workload",
    "across": "duplicates between workloads",
}


class SharingView(PlainView):
    """View of the events and the results of `pageferry sharing`."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return a line for a step, or for a result of `--watch`; None for progress."""
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
        """Return a progress bar during the scan, and a line for any other event."""
        if not isinstance(event, ScanEvent):
            return self.line(event)
        bar = Table.grid(padding=(0, 1))
        done = f"{size(event.done)} of {size(event.total)}"
        bar.add_row("scanning", ProgressBar(total=max(event.total, 1), completed=event.done, width=BAR), done)
        return bar

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the estimate as tables, followed by the results of merging, if any."""
        if not isinstance(result, SharingResult):
            return super().result(result)
        parts: list[RenderableType] = [narrow(_classes(result)), Text(), narrow(_curve(result)), Text()]
        parts += [note(_scan(result)), *(note(f"note: {reason}", "dim") for reason in result.not_shareable)]
        if result.freed is not None:
            parts += [Text(), note(_done(result), "bold")]
        return Group(*parts)


def _classes(result: SharingResult) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for title in ("found", "reclaimable"):
        table.add_column(title, justify="right")
    for name, found in result.classes.items():
        table.add_row(TITLES[name], size(found.pages * 4096), size(found.reclaimable))
    table.add_row("total", "", size(result.reclaimable), style="bold")
    return table


def _curve(result: SharingResult) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("huge pages split", "reclaimable", "possible here"):
        table.add_column(title, justify="right")
    table.add_column("")
    most = max(result.reclaimable, 1)
    for point in thinned(result.curve, SHOWN):
        bar = "█" * round(BAR * point.reclaimable / most)
        table.add_row(str(point.large_pages), size(point.reclaimable), size(point.possible), bar)
    return table


def _scan(result: SharingResult) -> str:
    scan = result.scan
    speed = rate(scan.scanned / max(scan.ms / 1e3, 1e-9))
    sampled = "" if scan.every == 1 else f", one of {scan.every} units of 2 MiB"
    scaled = "" if scan.scale == 1 else f", one of {scan.scale} contents compared"
    deferred = "" if not result.deferred else f"{size(result.deferred)} deferred (compared by signature, not loaded), "
    return (
        f"{size(result.memory)} present, {deferred}{result.large_pages} huge pages, {size(result.already_shared)} "
        f"already shared; scanned {size(scan.scanned)} in {duration(scan.ms / 1e3)} ({speed}{sampled}{scaled})"
    )


def _done(result: SharingResult) -> str:
    words = (
        f"freed {size(result.freed or 0)} (estimate {size(result.estimated or 0)}), {result.large_pages_broken} huge "
        f"pages split of {result.large_pages_chosen} chosen, each with at least {result.threshold} shareable pages"
    )
    if result.ksm_scans:
        words += f"; {result.ksm_scans} KSM scans, {duration((result.ksm_cpu_ms or 0) / 1e3)} of CPU time"
    if result.pauses:
        words += f"; {result.pauses} pauses of at most {duration((result.longest_pause_ms or 0) / 1e3)}"
    return words


def _summary(result: SharingResult) -> str:
    words = f"{size(result.reclaimable)} reclaimable of {size(result.memory)}, {size(result.possible)} possible here"
    return words if result.freed is None else f"{words}; {_done(result)}"
