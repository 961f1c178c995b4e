"""Argument types of several verbs: the parsers of `pageferry.values`, adapted to argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from pageferry import values
from pageferry.errors import UsageError

T = TypeVar("T")


def _argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return the parser with its errors converted: argparse prefixes them with the name of the option."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _integer(text: str) -> int:
    if not text.isascii() or len(text) > 20 or not text.lstrip("+-").isdigit():
        raise UsageError(f"invalid number {text!r}: expected an integer")
    return int(text)


size = _argument(values.parse_size)
"""Bytes from `512M`."""
rate = _argument(values.parse_rate)
"""Bytes per second from `100M` or `100M/s`."""
fraction = _argument(values.parse_fraction)
"""A fraction of 1 from `5%` or `0.05`."""
seconds = _argument(values.parse_duration)
"""Seconds from `200ms`, `1m`, or a number of seconds."""
milliseconds = _argument(lambda text: values.parse_duration(text, 1e-3))
"""Seconds from `300ms`, `1s`, or a number of milliseconds."""
integer = _argument(_integer)
"""An integer."""
