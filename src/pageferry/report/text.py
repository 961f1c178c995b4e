"""Human-readable output: the result on stdout, and progress on stderr. Progress is a live display on a terminal,
otherwise a line per event."""

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
from pageferry.report.view import View

WIDE = 500
"""Width of output to files and pipes, columns. It is large enough that no line is folded or truncated."""


class PlainView:
    """View that shows the names and values of a record's fields. It is the base class of the views of commands."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return the event as a line of the form `kind: name value, name value`."""
        fields = ", ".join(f"{name} {value}" for name, value in _fields(event).items())
        return f"{type(event).__name__.lower()}: {fields}"

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return the line of the event."""
        return self.line(event)

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return a table of the names and values of the fields."""
        table = Table.grid(padding=(0, 2))
        for name, value in _fields(result).items():
            table.add_row(name, str(value))
        return table


def named_values(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of bold names and their values."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


class HumanReporter:
    """Reporter that prints the events and the result of a view."""

    def __init__(self, view: View, data: Console | None = None, progress: Console | None = None) -> None:
        self._view = view
        self._data = data or _console(stderr=False)
        self._progress = progress or _console(stderr=True)
        self._live: Live | None = None

    def event(self, event: Event) -> None:
        """Update the live display if stderr is a terminal; otherwise print a line."""
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
            content = Text(content)  # literal: no markup, no highlighted numbers
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
        """Render with the text of every segment filtered (`printable`). Control codes of rich are in separate segments,
        which are not filtered."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  # called in an exception handler; the caller sets the exit code, not rich


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return _Console(stderr=stderr, width=None if stream.isatty() else WIDE)


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(record)
    return {name: value for name, value in fields.items() if name != record.__struct_config__.tag_field}
