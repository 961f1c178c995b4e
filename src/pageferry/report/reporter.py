"""Output of a command: events while the command runs, and one result at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from pageferry.events import Event
    from pageferry.report.view import View


class Reporter(Protocol):
    """Receiver of the events and the result of a command. The end of its context ends a live display."""

    def event(self, event: Event) -> None:
        """Emit an event, such as the end of a round."""

    def final(self, result: Event) -> None:
        """Emit the result. A command has at most one result, which follows the last event."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Sink(Protocol):
    """Additional receiver of all events and of the result, such as an event log."""

    def event(self, event: Event) -> None:
        """Receive an event or the result."""


_SINKS: ContextVar[tuple[Sink, ...]] = ContextVar("sinks", default=())


@contextmanager
def add_sink(sink: Sink) -> Iterator[None]:
    """Within the block, add a sink to every reporter that is opened: it receives the events before the reporter
    does."""
    token = _SINKS.set((*_SINKS.get(), sink))
    try:
        yield
    finally:
        _SINKS.reset(token)


def open_reporter(output: str, view: Callable[[], View] | None = None) -> Reporter:
    """Return the reporter for the value of `--output`. For `human`, `view` creates the view (default: `PlainView`)."""
    reporter = _for_stdout(output, view)
    sinks = _SINKS.get()
    return _WithSinks(reporter, sinks) if sinks else reporter


class _WithSinks:
    """Reporter that passes events to sinks first, so that the event log does not wait for a slow terminal."""

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


def _for_stdout(output: str, view: Callable[[], View] | None) -> Reporter:
    if output == "json":
        from pageferry.report.json import JsonReporter

        return JsonReporter()
    from pageferry.report.text import HumanReporter, PlainView

    return HumanReporter((view or PlainView)())
