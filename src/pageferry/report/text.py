"""Output for people: the result on stdout; progress on stderr, live on a terminal and a line per event elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Self

import msgspec
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from pageferry.events import Event
from pageferry.printable import printable
from pageferry.report.reporter import View

WIDE = 500
"""Columns of a file or a pipe: nothing is folded or cut there."""


class PlainView:
    """Shows anything by the names of its fields. Views of particular commands derive from it."""

    def line(self, event: msgspec.Struct) -> str | None:
        """`kind: name value, name value`."""
        fields = ", ".join(f"{name} {value}" for name, value in _fields(event).items())
        return f"{type(event).__name__.lower()}: {fields}"

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """The same line."""
        return self.line(event)

    def result(self, result: msgspec.Struct) -> RenderableType:
        """A table of names and values."""
        table = Table.grid(padding=(0, 2))
        for name, value in _fields(result).items():
            table.add_row(name, str(value))
        return table


def named_values(rows: Iterable[tuple[str, str]]) -> Table:
    """Names in bold, and the values beside them."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


class HumanReporter:
    """Shows events and result as a view makes them."""

    def __init__(self, view: View, data: Console | None = None, progress: Console | None = None) -> None:
        self._view = view
        self._data = data or _console(stderr=False)
        self._progress = progress or _console(stderr=True)
        self._live: Live | None = None

    def event(self, event: Event) -> None:
        """Update the live display, or write a line where there is no terminal."""
        if self._progress.is_terminal:
            self._show(self._view.live(event))
        elif (line := self._view.line(event)) is not None:
            self._progress.print(line, highlight=False, markup=False, soft_wrap=True)

    def final(self, result: Event) -> None:
        """End the live display and print the result."""
        self._end_live()
        self._data.print(self._view.result(result), highlight=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_live()

    def _show(self, content: RenderableType | None) -> None:
        if content is None:
            return
        if isinstance(content, str):
            content = Text(content)  # taken literally: no markup, no highlighted numbers
        if self._live is None:
            self._live = Live(content, console=self._progress, transient=True, redirect_stdout=False)
            self._live.start()
        self._live.update(content, refresh=True)

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class _Console(Console):
    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, markup=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, with the text of every segment filtered; rich's own control codes are segments apart."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  # called while the error is handled; what it means for the exit code is not rich's affair


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return _Console(stderr=stderr, width=None if stream.isatty() else WIDE)


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(record)
    return {name: value for name, value in fields.items() if name != record.__struct_config__.tag_field}
