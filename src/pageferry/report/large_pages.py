"""Human-readable output of `pageferry large-pages`: regions, histogram, heat map and summary."""

from __future__ import annotations

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.large_pages.events import BroughtBack, LargePagesResult, Sample, SampleEvent
from pageferry.report.figures.base import thinned
from pageferry.report.tables import narrow, note
from pageferry.report.text import PlainView
from pageferry.report.units import duration, size

SLOTS = 512
BINS = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-511", "512")
SHADES = " ░▒▓█"
COLUMNS = 64
"""Width of the heat map, columns; each column represents 8 base pages."""
ROWS = 24
"""Maximum number of rows of the heat map."""
BAR = 40


class LargePagesView(PlainView):
    """View of the events and the results of `pageferry large-pages`."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return a line for a round, or for a result of `--watch`."""
        match event:
            case SampleEvent():
                return (
                    f"round {event.round}: {event.sampled} huge pages, {event.idle} idle, "
                    f"{event.mean:.1f} base pages accessed on average, {event.cpu_ms:.1f} ms of CPU"
                )
            case BroughtBack():
                return f"{event.target}: {size(event.reloaded)} reloaded from the store"
            case LargePagesResult():
                return "; ".join(_summary(event))
            case _:
                return super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return the complete display for a result of `--watch`, and a line for any other event."""
        return self.result(event) if isinstance(event, LargePagesResult) else self.line(event)

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the tables, the heat map and the summary."""
        if isinstance(result, BroughtBack):
            return Text(self.line(result) or "")
        if not isinstance(result, LargePagesResult):
            return super().result(result)
        parts: list[RenderableType] = [narrow(_regions(result))]
        if result.samples:
            parts += [Text(), _histogram(result.histogram), Text(), narrow(_heat_map(result.samples))]
        parts += [Text(), *(note(line) for line in _summary(result))]
        parts += [note(f"skipped: {reason}", "yellow") for reason in result.skipped]
        return Group(*parts)


def _regions(result: LargePagesResult) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("region", "kind", "size", "huge pages", "sampled", "idle", "accessed of 512"):
        table.add_column(name, justify="left" if name in ("region", "kind") else "right", no_wrap=name != "region")
    table.columns[0].overflow = "fold"
    for region in result.regions:
        table.add_row(
            Text(region.name or "(anonymous)"),
            region.kind,
            size(region.bytes),
            str(region.large_pages),
            str(region.sampled),
            str(region.idle),
            f"{region.mean:.1f}" if region.sampled else "-",
        )
    return table


def _histogram(bins: list[int]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(justify="right")
    for name, count in zip(BINS, bins, strict=True):
        table.add_row(name, str(count), Text("█" * -(-count * BAR // max(*bins, 1)), style="cyan"))
    return Group(Text("base pages accessed per huge page", style="bold"), table)


def _heat_map(samples: list[Sample]) -> RenderableType:
    """Return the heat map: one row per sampled huge page, with its 512 base pages from left to right."""
    table = Table.grid(padding=(0, 1))
    shown = thinned(sorted(samples, key=lambda sample: -sample.activity), ROWS)
    for sample in shown:
        table.add_row(Text(f"{sample.address:#x}"), _cells(sample), Text(f"{sample.activity:3}"), Text(sample.decision))
    some = f" ({len(shown)} of {len(samples)}, by decreasing activity)"
    title = "accesses within the huge page" + (some if len(shown) < len(samples) else "")
    return Group(Text(title, style="bold"), table)


def _cells(sample: Sample) -> Text:
    if sample.touched is None:
        filled = "-" * -(-sample.activity * COLUMNS // SLOTS)
        return Text(f"[{filled:{COLUMNS}}]", style="dim")  # only the number of accessed pages is known
    bits, width = int(sample.touched, 16), SLOTS // COLUMNS
    counts = [(bits >> column * width & (1 << width) - 1).bit_count() for column in range(COLUMNS)]
    cells = "".join(SHADES[-(-count * (len(SHADES) - 1) // width)] for count in counts)
    return Text(f"[{cells}]", style="red" if sample.activity >= SLOTS // 2 else "")


def _summary(result: LargePagesResult) -> list[str]:
    found, overhead = result.estimate, result.overhead
    if not found.large_pages:
        return [f"{result.target} maps no huge pages"]
    window = duration(result.window_ms / 1e3)
    mean = f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f}) of 512 base pages accessed in {window}"
    lines = [
        f"estimate for {found.large_pages} huge pages from {found.sampled} samples: {mean}",
        f"idle: {size(found.idle)} ({size(found.idle_low)} to {size(found.idle_high)})",
        f"overhead: {overhead.fraction:.2%} of one CPU, {duration(overhead.per_page_us / 1e6)} per page; "
        f"{result.restored} mappings restored" + (f", {result.not_restored} NOT" if result.not_restored else ""),
    ]
    if result.limited_by is not None:
        limits = {"budget": "--budget (0: unlimited)", "mappings": "the maximum number of mappings (vm.max_map_count)"}
        lines.append(f"limited by {limits[result.limited_by]}: rounds had fewer samples than --sample requests")
    if result.broken:
        where = "swap" if result.store is None else f"{result.store.path} ({size(result.store.bytes)})"
        lines.append(f"reclaimed: {size(result.reclaimed)} to {where}, {result.broken} huge pages split")
    if result.store is not None and result.store.pauses:
        longest = duration(result.store.longest_pause_ms / 1e3)
        lines.append(f"{result.store.pauses} pauses of at most {longest}")
    if result.store is not None and result.store.equal:
        lines.append(f"{result.store.equal} pages of the store are duplicates, and are stored once")
    return lines
