"""Interface of the human-readable output of a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import msgspec
    from rich.console import RenderableType


class View(Protocol):
    """Human-readable form of the events and the result of a command."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return an event as a line of text; None to omit it."""

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return the content of the live display after this event; None leaves the display unchanged."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the result in the form that is printed on stdout."""
