"""The two things that a command tells: events while it works, and one result at the end."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import msgspec
    from rich.console import RenderableType


class Reporter(Protocol):
    """Where a command sends what it has to tell. A context manager: leaving it ends a live display."""

    def event(self, event: msgspec.Struct) -> None:
        """Something happened on the way (a round ended, a phase began)."""

    def final(self, result: msgspec.Struct) -> None:
        """The result; at most one, after the last event."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class View(Protocol):
    """How the events and the result of a command look to a person."""

    def line(self, event: msgspec.Struct) -> str | None:
        """An event as a line, for a log file; None: not worth one."""

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """The display on a terminal from this event on, replacing the one before; None: it stays as it is."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """The result, on stdout."""


def open_reporter(output: str, view: View | None = None) -> Reporter:
    """The reporter for `--output`: `json`, or `human`, which shows things by `view` (default: names and values)."""
    if output == "json":
        from pageferry.report.json import JsonReporter

        return JsonReporter()
    from pageferry.report.text import HumanReporter, PlainView

    return HumanReporter(view or PlainView())
