"""Tests of the parsing and formatting of sizes, rates and times."""

import argparse

import pytest

from pageferry.cli.arguments import size as parse_size
from pageferry.report.units import duration, rate, size


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("512", 512), ("4k", 4096), ("2MiB", 2 << 20), ("1.5G", 3 << 29), ("1GB", 1 << 30), ("2T", 2 << 40)],
)
def test_sizes_are_binary(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "-1", "G", "1X", "1.G", "1e9", "0x10", "1 2"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="invalid size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (203 << 20, "203 MiB"), (5 << 60, "5120 PiB")],
)
def test_sizes_are_shown_in_binary_units(count: int, text: str) -> None:
    assert size(count) == text


def test_rates_and_times_are_formatted() -> None:
    assert rate(850 << 20) == "850 MiB/s"
    assert [duration(value) for value in (0.00012, 0.0034, 12, 125)] == ["120 us", "3.4 ms", "12.0 s", "2 min 05 s"]
