"""Estimates for all huge pages from a sample of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from pageferry.large_pages.sampler import SLOTS
from pageferry.memory.regions import SMALL_PAGE

_Z = 1.96
"""Half the width of a 95 % confidence interval, in standard errors."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Mean activity of all huge pages with its 95 % confidence interval, and the resulting estimate of unused
    memory."""

    large_pages: int
    """Number of huge pages."""
    sampled: int
    mean: float
    """Mean number of base pages accessed per huge page and window."""
    low: float
    high: float
    idle: int
    """Estimated total size of the base pages that are not accessed in a window, over all huge pages, bytes."""
    idle_low: int
    idle_high: int


def estimate(counts: Sequence[int], population: int) -> Estimate:
    """Return the estimate for `population` huge pages from the activities of a simple random sample of them.

    The half-width is 1.96 standard errors, with finite population correction. If all samples are equal, the variance
    cannot be estimated. The half-width then assumes full activity of the fraction of pages that the sample could have
    missed (3 divided by the sample size).
    """
    size = len(counts)
    population = max(population, size)
    if size == 0:
        everything = population * SLOTS * SMALL_PAGE
        return _estimate(population, 0, 0.0, 0.0, float(SLOTS)) if everything else _estimate(0, 0, 0.0, 0.0, 0.0)
    mean = sum(counts) / size
    rest = (population - size) / population
    if min(counts) == max(counts):
        half = SLOTS * min(3 / size, 1.0) * rest
    else:
        variance = sum((count - mean) ** 2 for count in counts) / (size - 1)
        half = _Z * math.sqrt(variance / size * rest)
    return _estimate(population, size, mean, max(mean - half, 0.0), min(mean + half, float(SLOTS)))


def _estimate(population: int, size: int, mean: float, low: float, high: float) -> Estimate:
    def idle(activity: float) -> int:
        return round(population * (SLOTS - activity)) * SMALL_PAGE

    return Estimate(
        large_pages=population,
        sampled=size,
        mean=mean,
        low=low,
        high=high,
        idle=idle(mean),
        idle_low=idle(high),
        idle_high=idle(low),
    )
