"""Human-readable output of `pageferry serve`."""

from __future__ import annotations

import msgspec
from rich.console import RenderableType
from rich.text import Text

from pageferry.pager.firecracker.events import (
    MicrovmConnected,
    MicrovmEnded,
    MicrovmFailed,
    MicrovmRefused,
    ServeResult,
    Serving,
)
from pageferry.report.text import PlainView
from pageferry.report.units import duration, size, us


class ServeView(PlainView):
    """View with a line for each microVM that connects or ends. Failures are logged."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return an event as a line."""
        match event:
            case Serving():
                return _serving(event)
            case MicrovmConnected():
                return f"microVM {event.microvm}: connected; {size(event.deferred)} deferred"
            case MicrovmEnded():
                return _ended(event)
            case MicrovmRefused() | MicrovmFailed():
                return None
            case _:
                return super().line(event)

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the result as lines."""
        match result:
            case Serving():
                return Text(f"{_serving(result)} by process {result.pager}, with its log in {result.log}")
            case ServeResult():
                words = f"{result.image}: {result.microvms} served, {result.loaded} loaded completely"
                return Text("\n".join([words, *result.failed]))
            case _:
                return super().result(result)


def _serving(event: Serving) -> str:
    return f"{event.socket}: serving {size(event.memory)} of memory from {event.image}"


def _ended(event: MicrovmEnded) -> str:
    times = event.service_times
    left = f"; {size(event.deferred)} deferred" if event.deferred else ""
    return (
        f"microVM {event.microvm}: {event.end} after {duration(event.duration_ms / 1e3)}{left}; {event.faults:,} "
        f"faults, {event.missed:,} on deferred pages, median {us(times.p50_us)}, p99 {us(times.p99_us)}; "
        f"{event.prefetched:,} pages prefetched"
    )
