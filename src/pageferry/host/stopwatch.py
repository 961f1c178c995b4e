"""Stopwatch with named spans that accumulate, and a total."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Stopwatch for named spans; spans of one name accumulate. The span `total` runs until `stop_all`."""

    def __init__(self, phase: str | None = None) -> None:
        """Start `total` and, if given, the first phase at the same time."""
        self._since = time.perf_counter()
        self._spent: dict[str, float] = {}
        self._running: dict[str, float] = {"total": self._since}
        self.phases: dict[str, float] = {}
        """Duration of the consecutive phases in seconds, by name. The durations add up to the total."""
        self._phase = phase

    def start(self, name: str, at: float | None = None) -> None:
        """Start a span, now or at an earlier time of `time.perf_counter`."""
        self._running[name] = time.perf_counter() if at is None else at

    def stop(self, name: str, at: float | None = None) -> None:
        """End a span, now or at an earlier time of `time.perf_counter`."""
        now = time.perf_counter() if at is None else at
        self._spent[name] = self._spent.get(name, 0.0) + now - self._running.pop(name)

    def phase(self, name: str, at: float | None = None) -> None:
        """End the current phase and start the phase `name` at the same time, so that phases add up. `at`: time of the
        change (`time.perf_counter`), limited to the start of the current phase; None for now.
        """
        now = time.perf_counter() if at is None else max(at, self._since)
        if self._phase is not None:
            self.phases[self._phase] = self.phases.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now

    def stop_all(self) -> None:
        """End all running spans and the phase at the same time."""
        now = time.perf_counter()
        self.phase("", at=now)
        for name in tuple(self._running):
            self.stop(name, at=now)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure a block of code as a span."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def seconds(self, name: str) -> float:
        """Return the time of all ended spans of this name, seconds; 0 if there are none."""
        return self._spent.get(name, 0.0)

    def phase_milliseconds(self) -> dict[str, float]:
        """Return the milliseconds of all ended phases by name, rounded to the microsecond."""
        return {name: round(seconds * 1e3, 3) for name, seconds in self.phases.items() if name}

    def milliseconds(self, name: str) -> float:
        """Return the milliseconds of all ended spans of this name, rounded to the microsecond."""
        return round(self.seconds(name) * 1e3, 3)
