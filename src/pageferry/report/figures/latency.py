"""How long accesses waited for a pager: the same picture for a restore and after a switch-over."""

from __future__ import annotations

import math

from pageferry.events import Latency
from pageferry.report.charts import histogram
from pageferry.report.figures.base import Figure
from pageferry.report.units import duration


def latency(times: Latency) -> list[Figure]:
    """How long accesses waited, as a histogram."""
    filled = [number for number, count in enumerate(times.bins) if count]
    if not filled:
        return []
    first, last = filled[0], filled[-1]
    counts = times.bins[first : last + 1]
    edges = [_edge(power) for power in range(first - 1, last + 1)]
    marks = [
        (_place(value, first, last), f"{name}: {duration(value / 1e6)}")
        for name, value in (("half", times.p50_us), ("90 %", times.p90_us), ("99 %", times.p99_us))
    ]
    rows = [(edges[number], edges[number + 1], count) for number, count in enumerate(counts)]
    return [
        Figure(
            "latency",
            "How long accesses waited",
            "Accesses by the time that the pager took for them; each bar is twice as long a time as the one before, so "
            "the axis is logarithmic. Marked: within which time half, 90 % and 99 % were served (upper ends of bars).",
            histogram("Accesses by time of service", edges, counts, "time, logarithmic", marks),
            (("from", "text"), ("to", "text"), ("accesses", "count")),
            rows,
            ((1, "accesses"),),
        )
    ]


def _edge(power: int) -> str:
    """The upper end of bin number `power`."""
    if power < 0:
        return "0"
    micros = 1 << power
    for limit, unit in ((1 << 20, "s"), (1 << 10, "ms")):
        if micros >= limit:
            return f"{micros // limit} {unit}"
    return f"{micros} us"


def _place(value: float, first: int, last: int) -> float:
    """Bins from the left: values are upper ends of bins, or the longest time within the last."""
    power = math.log2(max(value, 1))
    return min(max(power - (first - 1), 0), last - first + 1)
