"""How the activity of large pages looks to a person: regions, a histogram, a heat map and what follows from it."""

from __future__ import annotations

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.large_pages.events import BroughtBack, LargePagesResult, Sample, SampleEvent
from pageferry.report.figures.base import thinned
from pageferry.report.text import PlainView
from pageferry.report.units import duration, size

SLOTS = 512
BINS = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-511", "512")
SHADES = " ░▒▓█"
COLUMNS = 64
"""Of the heat map: each stands for 8 small pages."""
ROWS = 24
"""Of the heat map, at most."""
BAR = 40


class LargePagesView(PlainView):
    """Shows events and results of `pageferry.large_pages.events`."""

    def line(self, event: msgspec.Struct) -> str | None:
        """A line per round, or per result when they are many."""
        match event:
            case SampleEvent():
                return (
                    f"round {event.round}: {event.sampled} large pages, {event.idle} idle, "
                    f"{event.mean:.1f} small pages accessed on average, {event.cpu_ms:.1f} ms of CPU"
                )
            case BroughtBack():
                return f"{event.target}: {size(event.brought_back)} brought back from the store"
            case LargePagesResult():
                return "; ".join(_verdict(event))
            case _:
                return super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """The whole picture while watching; a line otherwise."""
        return self.result(event) if isinstance(event, LargePagesResult) else self.line(event)

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Everything."""
        if isinstance(result, BroughtBack):
            return Text(self.line(result) or "")
        if not isinstance(result, LargePagesResult):
            return super().result(result)
        parts: list[RenderableType] = [_regions(result)]
        if result.samples:
            parts += [Text(), _histogram(result.histogram), Text(), _heat_map(result.samples)]
        parts += [Text(), *(Text(line) for line in _verdict(result))]
        parts += [Text(f"left out: {reason}", style="yellow") for reason in result.skipped]
        return Group(*parts)


def _regions(result: LargePagesResult) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("region", "kind", "size", "large pages", "sampled", "idle", "accessed of 512"):
        table.add_column(name, justify="left" if name in ("region", "kind") else "right", overflow="fold")
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
    return Group(Text("small pages accessed per large page", style="bold"), table)


def _heat_map(samples: list[Sample]) -> RenderableType:
    """A line per sampled page, its 512 small pages from left to right."""
    table = Table.grid(padding=(0, 1))
    shown = thinned(sorted(samples, key=lambda sample: -sample.activity), ROWS)
    for sample in shown:
        table.add_row(Text(f"{sample.address:#x}"), _cells(sample), Text(f"{sample.activity:3}"), Text(sample.decision))
    some = f" ({len(shown)} of {len(samples)}, from the most active to the least)"
    title = "where in the page" + (some if len(shown) < len(samples) else "")
    return Group(Text(title, style="bold"), table)


def _cells(sample: Sample) -> Text:
    if sample.touched is None:
        filled = "-" * -(-sample.activity * COLUMNS // SLOTS)
        return Text(f"[{filled:{COLUMNS}}]", style="dim")  # how many, not where
    bits, width = int(sample.touched, 16), SLOTS // COLUMNS
    counts = [(bits >> column * width & (1 << width) - 1).bit_count() for column in range(COLUMNS)]
    cells = "".join(SHADES[-(-count * (len(SHADES) - 1) // width)] for count in counts)
    return Text(f"[{cells}]", style="red" if sample.activity >= SLOTS // 2 else "")


def _verdict(result: LargePagesResult) -> list[str]:
    found, overhead = result.estimate, result.overhead
    if not found.large_pages:
        return [f"{result.target} maps no large pages"]
    window = duration(result.window_ms / 1e3)
    mean = f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f}) of 512 small pages accessed in {window}"
    lines = [
        f"estimate for {found.large_pages} large pages from {found.sampled}: {mean}",
        f"idle: {size(found.idle)} ({size(found.idle_low)} to {size(found.idle_high)})",
        f"overhead: {overhead.fraction:.2%} of a CPU, {duration(overhead.per_page_us / 1e6)} a page; "
        f"{result.restored} mappings restored" + (f", {result.not_restored} NOT" if result.not_restored else ""),
    ]
    if result.limited_by is not None:
        limits = {"budget": "--budget (0 lifts that)", "mappings": "the mappings that a process may have"}
        lines.append(f"limited by {limits[result.limited_by]}: rounds were smaller than --sample asks for")
    if result.broken:
        where = "swap" if result.store is None else f"{result.store.path} ({size(result.store.bytes)})"
        lines.append(f"reclaimed: {size(result.reclaimed)} to {where}, {result.broken} large pages broken")
    if result.store is not None and result.store.pauses:
        longest = duration(result.store.longest_pause_ms / 1e3)
        lines.append(f"{result.store.pauses} pauses, the longest {longest}")
    if result.store is not None and result.store.equal:
        lines.append(f"{result.store.equal} pages of the store equal others, and are stored once with them")
    return lines
