"""Progress record of a running command for `pageferry top`, derived from its events (see `host.jobs`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

from pageferry.events import Event
from pageferry.host import jobs
from pageferry.host.registry import Registry

INTERVAL = 0.2
"""Minimum time between two updates of the record in the same phase, seconds."""

PHASES = {
    "setup": "copying",
    "armed": "pausing",
    "snapshot-point": "saving",
    "listening": "waiting",
    "received": "serving",
    "large-pages": "watching",
    "sharing": "watching",
    "restore": "running",
}
"""Name of the phase that an event starts, by the type of the event."""


class Progress:
    """Sink that writes the progress record of this command to the directories of its workloads, and removes it at the
    end."""

    def __init__(self, verb: str, names: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        registry = Registry()
        self.folders = [registry.path / name for name in names]
        self.job = jobs.ours(verb, time.time())
        self._most = 0
        self._clock = clock
        self._written = float("-inf")
        self._round_at = float("-inf")
        """Time of the last event about a round of pages."""

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        for folder in self.folders:
            jobs.remove(folder, self.job.pid)

    def event(self, event: Event) -> None:
        """Update the record from an event. A change within a phase is written at most every INTERVAL seconds."""
        changes = self._changes(event)
        if not changes:
            return
        steps = changes.get("phase", self.job.phase) != self.job.phase
        self.job = msgspec.structs.replace(self.job, **changes)
        if steps or self._clock() - self._written >= INTERVAL:
            self._write()

    def _write(self) -> None:
        self._written = self._clock()
        for folder in self.folders:
            jobs.write(folder, self.job)

    def _changes(self, event: Event) -> dict[str, Any]:
        """Return the changes of the record. The methods for a kind of event import its module only when such an event
        is received, so that no command imports the events of other commands."""
        match type(event).__module__:
            case "pageferry.migration.events":
                changes = self._after_migration(event)
            case "pageferry.checkpoints.events":
                changes = self._after_checkpoint(event)
            case "pageferry.large_pages.events":
                changes = _while_sampling(event)
            case "pageferry.sharing.events":
                changes = _while_scanning(event)
            case _:
                changes = None
        if changes is not None:
            return changes
        phase = PHASES.get(str(event.__struct_config__.tag))
        return {"phase": phase, "fraction": None} if phase is not None else {}

    def _after_migration(self, event: Event) -> dict[str, Any] | None:
        from pageferry.migration import events

        match event:
            case events.ProgressEvent():
                self._round_at = self._clock()
                rate = round(event.mbps * 1e6 / 8)
                return {"phase": f"round {event.round}", "fraction": _part(event.done, event.total), "rate": rate}
            case events.DiskProgressEvent() if self._clock() - self._round_at > 1:  # no round is in progress
                return {"phase": "disks", "fraction": _part(event.done, event.total)}
            case events.RoundEvent():
                return {"dirty_rate": event.dirty_rate, "rate": round(event.mbps * 1e6 / 8)}
            case events.PostcopyEvent():
                self._most = max(self._most, event.remaining)
                part = 1 - _part(event.remaining, self._most)
                return {"phase": event.status, "fraction": part, "rate": round(event.mbps * 1e6 / 8) or None}
        return None

    def _after_checkpoint(self, event: Event) -> dict[str, Any] | None:
        from pageferry.checkpoints import events

        match event:
            case events.SavingEvent():
                return {"phase": "saving", "fraction": _part(event.done, event.total)}
            case events.RunningEvent():
                self._most = event.deferred
                return {"phase": "loading", "fraction": 0.0}
            case events.ProgressEvent():
                self._most = max(self._most, event.deferred)
                return {"phase": "loading", "fraction": 1 - _part(event.deferred, self._most)}
        return None


def _while_sampling(event: Event) -> dict[str, Any] | None:
    from pageferry.large_pages.events import SampleEvent

    return {"phase": f"sampling {event.round}"} if isinstance(event, SampleEvent) else None


def _while_scanning(event: Event) -> dict[str, Any] | None:
    from pageferry.sharing.events import ApplyEvent, ScanEvent

    match event:
        case ScanEvent():
            return {"phase": "scanning", "fraction": _part(event.done, event.total)}
        case ApplyEvent():
            return {"phase": event.step, "fraction": None}
    return None


def _part(done: int, total: int) -> float:
    return min(done / total, 1.0) if total else 1.0
