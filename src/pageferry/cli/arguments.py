"""Argument types of several verbs: the parsers of `pageferry.values`, adapted to argparse."""

from __future__ import annotations

from pageferry import values
from pageferry.cli.options import argument
from pageferry.options import parse_integer

size = argument(values.parse_size)
"""Bytes from `512M`."""
seconds = argument(values.parse_duration)
"""Seconds from `200ms`, `1m`, or a number of seconds."""
integer = argument(parse_integer)
"""An integer."""
