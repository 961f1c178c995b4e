"""Named spans of time that add up, and one that runs from the beginning."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures spans by name; spans of the same name add up. The span `total` runs until `stop_all`."""

    def __init__(self, phase: str | None = None) -> None:
        """Start `total`, and at the same moment the first phase, if it is given."""
        self._since = time.perf_counter()
        self._spent: dict[str, float] = {}
        self._running: dict[str, float] = {"total": self._since}
        self.phases: dict[str, float] = {}
        """Seconds of consecutive phases, by name; together they are the total."""
        self._phase = phase

    def start(self, name: str) -> None:
        """Start a span."""
        self._running[name] = time.perf_counter()

    def stop(self, name: str) -> None:
        """End a span."""
        self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - self._running.pop(name)

    def phase(self, name: str) -> None:
        """End the phase before and begin this one at the same moment: phases are consecutive and add up."""
        now = time.perf_counter()
        if self._phase is not None:
            self.phases[self._phase] = self.phases.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now

    def stop_all(self) -> None:
        """End everything that runs."""
        self.phase("")
        for name in tuple(self._running):
            self.stop(name)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """A span around a block of code."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def seconds(self, name: str) -> float:
        """Time of all ended spans of that name; 0 where there are none."""
        return self._spent.get(name, 0.0)

    def phase_milliseconds(self) -> dict[str, float]:
        """Milliseconds of the phases that have ended, by name, to the microsecond."""
        return {name: round(seconds * 1e3, 3) for name, seconds in self.phases.items() if name}

    def milliseconds(self, name: str) -> float:
        """As `seconds`, to the microsecond."""
        return round(self.seconds(name) * 1e3, 3)
