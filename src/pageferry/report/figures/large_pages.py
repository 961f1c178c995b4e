"""Figures of huge pages: activity, idle memory and access patterns."""

from __future__ import annotations

from pageferry.large_pages.events import LargePagesResult, Sample, SampleEvent
from pageferry.report.charts import Bar, Series, Strip, bars, columns, heat
from pageferry.report.event_log import Log
from pageferry.report.figures.base import Fact, Figure, thinned
from pageferry.report.units import duration, size

SLOTS = 512
CELLS = 64
MAX_ROWS = 32
"""Maximum number of rows of the heat map."""
BINS = ("0", "1", "2–3", "4–7", "8–15", "16–31", "32–63", "64–127", "128–255", "256–511", "512")


def facts(log: Log) -> list[Fact]:
    """Return the facts of the last result in the log."""
    results = log.of(LargePagesResult)
    if not results:
        return [Fact("rounds", len(log.of(SampleEvent)), "count", lead=True)] if log.of(SampleEvent) else []
    result = results[-1][1]
    found = result.estimate
    facts = [
        Fact("huge pages", found.large_pages, "count", lead=True, note=f"{found.sampled:,} sampled"),
        Fact("idle", found.idle, "bytes", lead=True, note=f"{size(found.idle_low)} to {size(found.idle_high)}"),
        Fact(
            "used per huge page", f"{found.mean:.1f} of 512", lead=True, note=f"in {duration(result.window_ms / 1e3)}"
        ),
        Fact("CPU use", result.overhead.fraction, "part", note="of one CPU"),
        Fact("faults caused", result.overhead.faults, "count"),
        Fact("mappings restored", result.restored, "count"),
        Fact("target", result.target),
    ]
    if result.broken:
        facts.insert(3, Fact("reclaimed", result.reclaimed, "bytes", lead=True, note=f"{result.broken} split"))
    if result.not_restored:
        facts.insert(0, Fact("mappings NOT restored", result.not_restored, "count", lead=True))
    return facts


def figures(log: Log) -> list[Figure]:
    """Return the figures of the last result in the log."""
    results = log.of(LargePagesResult)
    if not results or not results[-1][1].samples:
        return []
    result = results[-1][1]
    return [*_histogram(result), *_regions(result), *_heat_map(result)]


def _histogram(result: LargePagesResult) -> list[Figure]:
    return [
        Figure(
            "activity",
            "Use of huge pages",
            "Sampled huge pages by the number of their 512 base pages accessed in the window. Those on the left "
            "waste the most memory.",
            columns(
                "Huge pages by base pages accessed",
                BINS,
                [Series("huge pages", 1, result.histogram)],
                lambda value: f"{value:,.0f}",
                "base pages accessed, of 512",
            ),
            (("base pages accessed", "text"), ("huge pages", "count")),
            list(zip(BINS, result.histogram, strict=True)),
            ((1, "huge pages sampled"),),
        )
    ]


def _heat_map(result: LargePagesResult) -> list[Figure]:
    """Return a heat map of up to MAX_ROWS samples, in order of decreasing activity."""
    chosen = thinned(sorted(result.samples, key=lambda sample: -sample.activity), MAX_ROWS)
    if not any(sample.activity for sample in chosen):
        return []
    rows = [Strip(f"{sample.address:#x}", _cells(sample), f"{sample.activity}", 3) for sample in chosen]
    without = sum(sample.touched is None for sample in chosen)
    caption = "One row per huge page, with its 512 base pages from left to right: a stronger colour means more "
    caption += "accessed pages. The number of accessed pages is on the right."
    if without:
        caption += f" For {without} pages of private memory, only the number is known: their rows are shaded evenly."
    if len(chosen) < len(result.samples):
        caption += f" Shown are {len(chosen)} of {len(result.samples):,} samples, by decreasing activity."
    return [
        Figure(
            "heat-map",
            "Accesses within huge pages",
            caption,
            heat("Accessed parts of huge pages", rows, "position in the huge page"),
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
            "Use by region",
            "Mean number of base pages accessed per huge page of each region.",
            bars("Activity by region", drawn, lambda value: f"{value:.0f}"),
            (("region", "text"), ("kind", "text"), ("size", "bytes"), ("huge pages", "count"), ("idle", "count")),
            [(one.name or "(anonymous)", one.kind, one.bytes, one.large_pages, one.idle) for one in result.regions],
            ((1, "accessed, of 512"),),
        )
    ]
