"""Activity of large pages drawn: where they are used, how much, and what is idle."""

from __future__ import annotations

from pageferry.large_pages.events import LargePagesResult, Sample, SampleEvent
from pageferry.report.charts import Bar, Series, Strip, bars, columns, heat
from pageferry.report.event_log import Log
from pageferry.report.figures.base import Fact, Figure, thinned
from pageferry.report.units import duration, size

SLOTS = 512
CELLS = 64
MOST_ROWS = 32
BINS = ("0", "1", "2–3", "4–7", "8–15", "16–31", "32–63", "64–127", "128–255", "256–511", "512")


def facts(log: Log) -> list[Fact]:
    """What it comes down to."""
    results = log.of(LargePagesResult)
    if not results:
        return [Fact("rounds", len(log.of(SampleEvent)), "count", lead=True)] if log.of(SampleEvent) else []
    result = results[-1][1]
    found = result.estimate
    told = [
        Fact("large pages", found.large_pages, "count", lead=True, note=f"{found.sampled:,} looked at"),
        Fact("idle", found.idle, "bytes", lead=True, note=f"{size(found.idle_low)} to {size(found.idle_high)}"),
        Fact(
            "used per large page", f"{found.mean:.1f} of 512", lead=True, note=f"in {duration(result.window_ms / 1e3)}"
        ),
        Fact("cost", result.overhead.fraction, "part", note="of one CPU"),
        Fact("faults for it", result.overhead.faults, "count"),
        Fact("mappings restored", result.restored, "count"),
        Fact("target", result.target),
    ]
    if result.broken:
        told.insert(3, Fact("reclaimed", result.reclaimed, "bytes", lead=True, note=f"{result.broken} broken"))
    if result.not_restored:
        told.insert(0, Fact("mappings NOT restored", result.not_restored, "count", lead=True))
    return told


def figures(log: Log) -> list[Figure]:
    """All there is to draw: of a watch, the last look."""
    results = log.of(LargePagesResult)
    if not results or not results[-1][1].samples:
        return []
    result = results[-1][1]
    return [*_histogram(result), *_regions(result), *_heat_map(result)]


def _histogram(result: LargePagesResult) -> list[Figure]:
    return [
        Figure(
            "activity",
            "How much of a large page is used",
            "Large pages that were looked at, by how many of their 512 small pages were accessed in the window. On the "
            "left are those that waste most.",
            columns(
                "Large pages by small pages accessed",
                BINS,
                [Series("large pages", 1, result.histogram)],
                lambda value: f"{value:,.0f}",
                "small pages accessed, of 512",
            ),
            (("small pages accessed", "text"), ("large pages", "count")),
            list(zip(BINS, result.histogram, strict=True)),
            ((1, "large pages looked at"),),
        )
    ]


def _heat_map(result: LargePagesResult) -> list[Figure]:
    """Samples from the most active one to the least, as many as there is room for."""
    chosen = thinned(sorted(result.samples, key=lambda sample: -sample.activity), MOST_ROWS)
    if not any(sample.activity for sample in chosen):
        return []
    rows = [Strip(f"{sample.address:#x}", _cells(sample), f"{sample.activity}", 3) for sample in chosen]
    without = sum(sample.touched is None for sample in chosen)
    caption = "A row for each large page, its 512 small pages from left to right: the stronger the colour, the more "
    caption += "were accessed. The number is how many."
    if without:
        caption += f" Of {without} (private memory) only the number is known: their rows are evenly shaded."
    if len(chosen) < len(result.samples):
        caption += f" {len(chosen)} of {len(result.samples):,}, from the most active to the least."
    return [
        Figure(
            "heat-map",
            "Where in its pages it is active",
            caption,
            heat("Accessed parts of large pages", rows, "place in the large page"),
            (("address", "text"), ("region", "text"), ("accessed of 512", "count"), ("decision", "text")),
            [(f"{one.address:#x}", one.region or "(anonymous)", one.activity, one.decision) for one in chosen],
            ((3, "accessed"),),
        )
    ]


def _cells(sample: Sample) -> list[float]:
    if sample.touched is None:
        return [sample.activity / SLOTS] * CELLS
    bits, width = int(sample.touched, 16), SLOTS // CELLS
    return [(bits >> cell * width & (1 << width) - 1).bit_count() / width for cell in range(CELLS)]


def _regions(result: LargePagesResult) -> list[Figure]:
    shown = [region for region in result.regions if region.sampled]
    drawn = [
        Bar((region.name or "(anonymous)")[-18:], region.mean, 1, f"{region.mean:.0f} of 512") for region in shown[:12]
    ]
    return [
        Figure(
            "regions",
            "By region",
            "Small pages accessed in an average large page of each region.",
            bars("Activity by region", drawn, lambda value: f"{value:.0f}"),
            (("region", "text"), ("kind", "text"), ("size", "bytes"), ("large pages", "count"), ("idle", "count")),
            [(one.name or "(anonymous)", one.kind, one.bytes, one.large_pages, one.idle) for one in result.regions],
            ((1, "accessed, of 512"),),
        )
    ]
