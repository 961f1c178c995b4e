"""Tables of at most `WIDTH` columns, with long texts below them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.table import Column, Table
from rich.text import Text

from pageferry.printable import message

WIDTH = 100
"""Maximum width of tables and of the notes below them, columns."""

MAX_NAME = 32
"""Maximum width of a column of names. Longer names are folded."""


def table(names: Iterable[str], *, right: Iterable[str], gap: int = 1, max_name: int = MAX_NAME) -> Table:
    """Return an empty table. The first column contains names, and is folded if they are longer than `max_name`.
    `right`: columns that are aligned to the right. `gap`: spaces between two columns."""
    right = set(right)
    columns = [Column(name, justify="right" if name in right else "left", no_wrap=True) for name in names]
    columns[0].no_wrap, columns[0].overflow, columns[0].max_width = False, "fold", max_name
    return Table(*columns, box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")


def with_notes(table: RenderableType, notes: Iterable[tuple[str, str]], style: str = "bold red") -> RenderableType:
    """Return a table, and below it a paragraph for each name and text."""
    lines = [note(f"{name}: {text}", style) for name, text in notes]
    return Group(table, Text(), *lines) if lines else table


def note(text: str, style: str = "") -> Text:
    """Return a paragraph of at most `WIDTH` columns."""
    return Text(_wrapped(message(text)), style=style)


def narrow(content: RenderableType) -> RenderableType:
    """Limit the width of a table whose columns can be folded."""
    return Constrain(content, WIDTH)


def _wrapped(text: str) -> str:
    """Return a text in lines of at most `WIDTH` columns, of which all but the first are indented."""
    lines = textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)
