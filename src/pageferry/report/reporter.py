"""The two things that a command tells: events while it works, and one result at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import msgspec
    from rich.console import RenderableType

    from pageferry.events import Event


class Reporter(Protocol):
    """Where a command sends what it has to tell. A context manager: leaving it ends a live display."""

    def event(self, event: Event) -> None:
        """Something happened on the way (a round ended, a phase began)."""

    def final(self, result: Event) -> None:
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


class Sink(Protocol):
    """Who else is told everything that a command tells: its event log."""

    def event(self, event: Event) -> None:
        """An event, or the result."""


_SINKS: ContextVar[tuple[Sink, ...]] = ContextVar("sinks", default=())


@contextmanager
def told_to(sink: Sink) -> Iterator[None]:
    """Within the block every reporter that is opened tells this one too."""
    token = _SINKS.set((*_SINKS.get(), sink))
    try:
        yield
    finally:
        _SINKS.reset(token)


def open_reporter(output: str, view: View | None = None) -> Reporter:
    """The reporter for `--output`: `json`, or `human`, which shows things by `view` (default: names and values)."""
    reporter = _for_stdout(output, view)
    sinks = _SINKS.get()
    return _Telling(reporter, sinks) if sinks else reporter


class _Telling:
    """A reporter that tells sinks too, and those first: what is written down must not wait for a slow terminal."""

    def __init__(self, reporter: Reporter, sinks: tuple[Sink, ...]) -> None:
        self._reporter = reporter
        self._sinks = sinks

    def event(self, event: Event) -> None:
        for sink in self._sinks:
            sink.event(event)
        self._reporter.event(event)

    def final(self, result: Event) -> None:
        for sink in self._sinks:
            sink.event(result)
        self._reporter.final(result)

    def __enter__(self) -> Self:
        self._reporter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._reporter.__exit__(kind, error, trace)


def _for_stdout(output: str, view: View | None) -> Reporter:
    if output == "json":
        from pageferry.report.json import JsonReporter

        return JsonReporter()
    from pageferry.report.text import HumanReporter, PlainView

    return HumanReporter(view or PlainView())
