"""First and last lines of event logs, and the result of `pageferry report`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pageferry.events import Event

Outcome = Literal["done", "failed", "interrupted", "unfinished"]


class LogHeader(Event, frozen=True, kw_only=True, tag="log"):
    """First line of a log: the command and its environment."""

    schema: int
    """Version of the events that follow."""
    verb: str
    arguments: dict[str, Any]
    """Arguments by name, with defaults and without secrets. Of a command line after `--`, only the program and the
    number of arguments are recorded."""
    pageferry: str
    """Version of pageferry."""
    kernel: str
    """Release of the kernel."""
    host: str
    pid: int
    started: str
    """Start time of the command, UTC, in ISO 8601 format."""


class LogEnd(Event, frozen=True, kw_only=True, tag="end"):
    """Last line of a log: exit code and error."""

    exit_code: int
    error: str | None = None
    """Class of the error: one of docs/exit-codes.md or another Python exception. None if the command succeeded."""
    message: str | None = None


class FactRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Key figure of a run, in JSON output."""

    name: str
    value: float | str | None
    unit: str
    """Unit of the value: `bytes`, `bytes/s`, `ms`, `us`, `count`, `part` (fraction of 1) or `text`."""


class FigureRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Table of the values of a figure, in JSON output."""

    name: str
    title: str
    columns: list[tuple[str, str]]
    """Name and unit of each column; the units are those of `FactRecord.unit`."""
    rows: list[list[float | str | None]]


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Summary of one log, in JSON output."""

    path: str
    verb: str
    subject: str
    """Workload, process or image on which the command operated; empty if there is none."""
    started: str
    outcome: Outcome
    """Outcome of the command. `unfinished`: the command was killed or is still running."""
    exit_code: int | None
    message: str | None
    duration_ms: float
    """Milliseconds from the first to the last line of the log."""
    facts: list[FactRecord]
    figures: list[FigureRecord]


class ReportResult(Event, frozen=True, kw_only=True, tag="report"):
    """Result of `pageferry report`."""

    runs: list[RunRecord]
    html: str | None
    """Path of the HTML page; None without --html."""
