"""JSON output: one object per line on stdout."""

from __future__ import annotations

import sys
from typing import BinaryIO, Self

import msgspec

from pageferry.events import Event
from pageferry.printable import printable_json


class JsonReporter:
    """Reporter that writes each event and the result as one line, and flushes it. `type` is the kind of the event."""

    def __init__(self, stream: BinaryIO | None = None) -> None:
        self._stream = stream or sys.stdout.buffer

    def event(self, event: Event) -> None:
        """Write an event."""
        self._stream.write(printable_json(msgspec.json.encode(event)) + b"\n")
        self._stream.flush()

    def final(self, result: Event) -> None:
        """Write the result."""
        self.event(result)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
