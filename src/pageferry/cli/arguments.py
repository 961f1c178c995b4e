"""Argument types that several verbs use: the parsers of `pageferry.values`, adapted to argparse."""

from __future__ import annotations

from pageferry import values
from pageferry.cli.options import argument
from pageferry.options import parse_integer

size = argument(values.parse_size)
"""Parser of a size such as `512M`; the result is in bytes."""
seconds = argument(values.parse_duration)
"""Parser of a duration such as `200ms` or `1m`, or of a number of seconds; the result is in seconds."""
integer = argument(parse_integer)
"""Parser of an integer."""
