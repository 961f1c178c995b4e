"""Tests that the percentiles of a histogram agree with those of its values."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pageferry.events import Latency, percentile


def binned(values: list[int]) -> list[int]:
    bins = [0] * 32
    for value in values:
        bins[min(value.bit_length(), 31)] += 1
    return bins


@given(st.lists(st.integers(0, 1 << 30), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_percentile_is_within_a_factor_of_two_above_the_true_one(values: list[int], part: float) -> None:
    true = sorted(values)[math.ceil(part * len(values)) - 1]
    found = percentile(binned(values), part, max(values))
    assert true <= found <= max(2 * true, 1)


def test_percentile_of_no_values_is_zero() -> None:
    empty = Latency.of([0] * 32, 0.0)
    assert (empty.bins, empty.p50_us, empty.p99_us, empty.longest_us) == ([], 0.0, 0.0, 0.0)


def test_empty_bins_at_the_end_are_left_out() -> None:
    assert Latency.of([0, 3, 0, 1, 0, 0], 5.5).bins == [0, 3, 0, 1]
