"""Tables of at most `WIDTH` columns, with long texts below them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from pageferry.printable import message

WIDTH = 100
"""Maximum width of tables and of the notes below them, columns."""

MAX_NAME = 32
"""Maximum width of a column of names. Longer names are folded."""


def table(names: Iterable[str], *, right: Iterable[str], gap: int = 1) -> Table:
    """Return an empty table. The first column contains names, and is folded if they are long. `right`: columns that are
    aligned to the right. `gap`: columns between two columns of the table."""
    right = set(right)
    columns = [Column(name, justify="right" if name in right else "left", no_wrap=True) for name in names]
    columns[0].no_wrap, columns[0].overflow, columns[0].max_width = False, "fold", MAX_NAME
    return Table(*columns, box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")


def with_notes(table: RenderableType, notes: Iterable[tuple[str, str]], style: str = "bold red") -> RenderableType:
    """Return a table, and below it a paragraph for each name and text."""
    paragraphs = [Text(wrapped(f"{name}: {message(text)}"), style=style) for name, text in notes]
    return Group(table, Text(), *paragraphs) if paragraphs else table


def wrapped(text: str) -> str:
    """Return a text in lines of at most `WIDTH` columns, of which all but the first are indented."""
    lines = textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)
