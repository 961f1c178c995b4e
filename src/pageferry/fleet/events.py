"""Events and results of fleets (`pageferry fleet`)."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.events import Event
from pageferry.fleet.model import Host, Image, Operation, Plan, Record, Unplaced, Workload

Phase = Literal["receiving", "moving", "progress", "recovering", "done", "aborted", "unknown", "given-up"]


class FleetJoined(Event, frozen=True, kw_only=True, tag="fleet-joined"):
    """The agent of this host is part of the fleet."""

    host: str
    address: str
    """Address on which the receivers of this host listen."""
    notes: list[str] = msgspec.field(default_factory=list)
    """Conditions that an operator should know."""


class SilentHost(Record, frozen=True, kw_only=True):
    """Host whose agent does not reply."""

    name: str
    reason: str


class FleetStatus(Event, frozen=True, kw_only=True, tag="fleet-status"):
    """Hosts, workloads, images and running operations of a fleet, as its hosts report them."""

    hosts: list[Host]
    workloads: list[Workload]
    images: list[Image]
    operations: list[Operation]
    silent: list[SilentHost]
    """Hosts whose agents do not reply. Their workloads are not affected, and are not listed."""
    notes: dict[str, list[str]]
    """Conditions that an operator should know, by host."""


class FleetMoveEvent(Event, frozen=True, kw_only=True, tag="fleet-move-event"):
    """Progress of one move of a plan."""

    at: float
    """Seconds since the start of the plan."""
    workload: str
    source: str
    destination: str
    attempt: int
    phase: Phase
    """`receiving`: the destination listens; `moving`: the source has started; `recovering`: the hosts determine the
    owner; `done`: the destination owns the workload; `aborted`: the source owns it; `unknown`: not determined yet;
    `given-up`: an operator must act."""
    fraction: float | None = None
    """Progress, 0 to 1, for `progress`."""
    reason: str = ""


class MoveResult(Record, frozen=True, kw_only=True):
    """Result of one move."""

    workload: str
    source: str
    destination: str
    outcome: Literal["done", "aborted", "unknown"]
    attempts: int
    started: float
    """Start of the last attempt, seconds since the start of the plan."""
    ended: float
    """End, seconds since the start of the plan."""
    mode: str | None = None
    downtime: float | None = None
    """Downtime, seconds; None if the source did not report it."""
    transferred: int | None = None
    """Bytes on the wire; None if the source did not report it."""
    shares_base: bool = False
    """Whether only private pages were sent, because the destination has the image."""
    reason: str = ""


class CloneStarted(Record, frozen=True, kw_only=True):
    """Clone of an image, or guest, that was started."""

    workload: str
    host: str
    error: str = ""
    """Reason why it does not run; empty if it runs."""


class Saved(Record, frozen=True, kw_only=True):
    """Checkpoint of a workload."""

    workload: str
    host: str
    image: str
    error: str = ""
    """Reason why no image was written; empty if it was."""
    length: int | None = None
    """Size of the image, bytes."""


class FleetResult(Event, frozen=True, kw_only=True, tag="fleet-result"):
    """Result of an operation on a fleet."""

    verb: str
    plan: Plan | None = None
    """Plan that was carried out, or only made (`dry_run`); None for operations without a plan."""
    total_time: float = 0.0
    """Seconds."""
    moves: list[MoveResult] = msgspec.field(default_factory=list)
    started: list[CloneStarted] = msgspec.field(default_factory=list)
    """Clones and guests."""
    saved: list[Saved] = msgspec.field(default_factory=list)
    unplaced: list[Unplaced] = msgspec.field(default_factory=list)
    """Workloads that were not moved or started, with the reason and what an operator must do."""
    silent: list[SilentHost] = msgspec.field(default_factory=list)
    """Hosts that the operation concerns, or may concern, and whose agents do not reply. Their workloads are not known,
    and not in the plan."""

    @property
    def complete(self) -> bool:
        """Whether every workload is where the plan puts it, and every host that the operation concerns has replied."""
        moved = all(one.outcome == "done" for one in self.moves)
        return moved and not self.unplaced and not self.silent and not self._errors

    @property
    def failures(self) -> list[str]:
        """Workloads that are not where the plan puts them, each with the reason and what an operator must do."""
        moves = (one for one in self.moves if one.outcome != "done")
        return [
            *(f"{one.workload} is not moved ({one.outcome}): {one.reason}" for one in moves),
            *self._errors,
            *(f"{one.workload}: {one.reason}; {one.remedy}" for one in self.unplaced),
            *_silence(self.silent),
        ]

    @property
    def _errors(self) -> list[str]:
        started = [f"{one.workload}: {one.error}" for one in self.started if one.error]
        return started + [f"{one.workload}: {one.error}" for one in self.saved if one.error]


class FleetCancelled(Event, frozen=True, kw_only=True, tag="fleet-cancelled"):
    """Operations that were cancelled."""

    workloads: list[str]
    silent: list[SilentHost] = msgspec.field(default_factory=list)
    """Hosts whose agents do not reply. Their operations are not cancelled."""

    @property
    def complete(self) -> bool:
        """Whether every host has replied."""
        return not self.silent

    @property
    def failures(self) -> list[str]:
        """Hosts whose operations are not cancelled, each with the reason and what an operator must do."""
        return _silence(self.silent)


def _silence(silent: list[SilentHost]) -> list[str]:
    return [
        f"workloads of {one.name} are not included: {one.reason}; start its agent (`pageferry fleet join`), and repeat "
        "the command"
        for one in silent
    ]
