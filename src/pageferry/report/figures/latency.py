"""Figure of the service times of page faults during a restore or after a post-copy switch-over."""

from __future__ import annotations

import math

from pageferry.events import Latency
from pageferry.report.charts import histogram
from pageferry.report.figures.base import Figure
from pageferry.report.units import duration


def latency(times: Latency) -> list[Figure]:
    """Return the histogram of service times; an empty list if there were no faults."""
    filled = [number for number, count in enumerate(times.bins) if count]
    if not filled:
        return []
    first, last = filled[0], filled[-1]
    counts = times.bins[first : last + 1]
    edges = [_edge(power) for power in range(first - 1, last + 1)]
    marks = [
        (_place(value, first, last), f"{name}: {duration(value / 1e6)}")
        for name, value in (("p50", times.p50_us), ("p90", times.p90_us), ("p99", times.p99_us))
    ]
    rows = [(edges[number], edges[number + 1], count) for number, count in enumerate(counts)]
    return [
        Figure(
            "latency",
            "Service times of faults",
            "Page faults by the time in which the pager served them, on a logarithmic axis: each bar covers twice the "
            "time of the previous one. The marks are percentiles, rounded up to the end of a bar.",
            histogram("Page faults by service time", edges, counts, "time, logarithmic", marks),
            (("from", "text"), ("to", "text"), ("faults", "count")),
            rows,
            ((1, "faults"),),
        )
    ]


def _edge(power: int) -> str:
    """Return the label of the upper edge of bin number `power`."""
    if power < 0:
        return "0"
    micros = 1 << power
    for limit, unit in ((1 << 20, "s"), (1 << 10, "ms")):
        if micros >= limit:
            return f"{micros // limit} {unit}"
    return f"{micros} us"


def _place(value: float, first: int, last: int) -> float:
    """Return the position of `value` (us) on the axis, in bins from the left edge of bin `first`. `value`: upper edge
    of a bin, or the maximum in bin `last`."""
    power = math.log2(max(value, 1))
    return min(max(power - (first - 1), 0), last - first + 1)
