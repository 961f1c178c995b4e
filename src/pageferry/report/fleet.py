"""Output of `pageferry fleet`: the state of a fleet, plans, and the progress and results of their moves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from pageferry.fleet.events import FleetCancelled, FleetJoined, FleetMoveEvent, FleetResult, FleetStatus
from pageferry.fleet.model import Plan
from pageferry.report.tables import table, with_notes
from pageferry.report.text import PlainView
from pageferry.report.units import duration, rate, size

_QUIET = ("progress",)
"""Phases that are not printed as lines."""


class FleetView(PlainView):
    """View of fleets. The live display has the plan, and below it the state of each move."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._moves: dict[str, FleetMoveEvent] = {}

    def line(self, event: msgspec.Struct) -> str | None:
        """Return a plan as text of several lines, and any other event as one line; None for the progress of moves."""
        match event:
            case Plan():
                return plan_text(event)
            case FleetMoveEvent(phase=phase) if phase in _QUIET:
                return None
            case FleetMoveEvent():
                return f"{event.at:7.2f} s  {_move(event)}"
            case FleetJoined():
                notes = "".join(f"\n{note}" for note in event.notes)
                return f"{event.host}: part of the fleet, receives workloads at {event.address}{notes}"
        return super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return the plan and the state of its moves."""
        match event:
            case Plan():
                self._plan = event
            case FleetMoveEvent():
                self._moves[event.workload] = event
            case _:
                return self.line(event)
        texts = [plan_text(self._plan)] if self._plan is not None else []
        return Text("\n".join([*texts, *map(_move, self._moves.values())]))

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the tables of a status or of the result of a plan."""
        match result:
            case FleetStatus():
                return _status(result)
            case FleetResult():
                return _result(result)
            case FleetCancelled():
                return Text(f"cancelled: {', '.join(result.workloads) or 'nothing was running'}")
        return super().result(result)


def plan_text(plan: Plan) -> str:
    """Return a plan as text: what moves where, in which order and mode, the bytes and the time, and what has no
    place."""
    lines = []
    for number, move in enumerate(plan.moves, 1):
        shares = ", private pages only" if move.shares_base else ""
        lines.append(
            f"{number:4}. {move.workload}: {move.source} -> {move.destination}, {move.mode}, {size(move.bytes)}{shares}"
            f", at {duration(move.start) if move.start else '0 s'} for {duration(move.seconds)}, downtime "
            f"{duration(move.downtime)}{f' ({move.reason})' if move.reason else ''}"
        )
    lines += [f"start {one.workload} on {one.host}: {size(one.bytes)}" for one in plan.placed]
    lines += [f"no place for {one.workload}: {one.reason}; {one.remedy}" for one in plan.unplaced]
    if plan.moves:
        total = f"total: {len(plan.moves)} moves, {size(plan.bytes)}, {duration(plan.makespan)}"
        lines.append(f"{total} (lower bound {duration(plan.lower_bound)})")
    if plan.deadline_note is not None:
        lines.append(f"deadline: {plan.deadline_note}")
    if plan.peaks:
        peak = plan.peaks[0]
        lines.append(f"most loaded link: {peak.link}, {rate(peak.rate)} of {rate(peak.capacity)}")
    return "\n".join(lines) or "nothing to do"


def _move(event: FleetMoveEvent) -> str:
    progress = f" {event.fraction:.0%}" if event.fraction is not None else ""
    attempt = f", attempt {event.attempt}" if event.attempt > 1 else ""
    reason = f": {event.reason}" if event.reason else ""
    return f"{event.workload}: {event.source} -> {event.destination}: {event.phase}{progress}{attempt}{reason}"


def _status(found: FleetStatus) -> RenderableType:
    hosts = table(
        ("HOST", "WORKLOADS", "MEMORY", "PRIVATE", "SHARED", "IMAGES", "BASES", "STATE"),
        right=("WORKLOADS", "MEMORY", "PRIVATE", "SHARED", "IMAGES", "BASES"),
    )
    count = Counter(one.host for one in found.workloads)
    private: Counter[str] = Counter()
    for workload in found.workloads:
        private[workload.host] += workload.private
    sizes = {image.identity: image.memory for image in found.images}
    for host in found.hosts:
        shared = sum(sizes.get(one, 0) for one in host.bases)
        state = "draining" if host.draining else "-"
        numbers = (str(count[host.name]), size(host.memory), size(private[host.name]), size(shared))
        hosts.add_row(host.name, *numbers, str(len(host.images)), str(len(host.bases)), state)
    for silent in found.silent:
        hosts.add_row(silent.name, *["?"] * 6, "silent")
    workloads = table(
        ("WORKLOAD", "HOST", "KIND", "STATUS", "MEMORY", "PRIVATE", "DIRTY", "IMAGE"),
        right=("MEMORY", "PRIVATE", "DIRTY"),
    )
    doing = {one.workload: one for one in found.operations}
    for one in sorted(found.workloads, key=lambda one: (one.host, one.name)):
        dirty = "-" if one.dirty_rate is None else rate(one.dirty_rate)
        state = doing[one.name].verb if one.name in doing else one.status
        base = "-" if one.base is None else one.base[:8]
        workloads.add_row(one.name, one.host, one.kind, state, size(one.memory), size(one.private), dirty, base)
    parts: list[RenderableType] = [with_notes(hosts, [(one.name, one.reason) for one in found.silent])]
    if found.workloads:
        parts += [Text(), with_notes(workloads, _notes(found), style="")]
    return Group(*parts)


def _notes(found: FleetStatus) -> Iterator[tuple[str, str]]:
    for host, notes in found.notes.items():
        yield from ((host, note) for note in notes)
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for one in found.workloads:
        if "move" in one.cannot:
            by_reason[one.cannot["move"]].append(one.name)
    yield from ((", ".join(names), reason) for reason, names in by_reason.items())


def _result(found: FleetResult) -> RenderableType:
    rows = table(
        ("WORKLOAD", "FROM", "TO", "OUTCOME", "MODE", "DURATION", "DOWNTIME", "SENT"),
        right=("DURATION", "DOWNTIME", "SENT"),
    )
    for one in found.moves:
        downtime = "-" if one.downtime is None else duration(one.downtime)
        sent = "-" if one.transferred is None else size(one.transferred)
        times = (duration(max(one.ended - one.started, 0.0)), downtime, sent)
        rows.add_row(one.workload, one.source, one.destination, one.outcome, one.mode or "-", *times)
    for started in found.started:
        rows.add_row(started.workload, "-", started.host, "failed" if started.error else "runs", *["-"] * 4)
    for saved in found.saved:
        length = "-" if saved.length is None else size(saved.length)
        rows.add_row(saved.workload, saved.host, saved.image, "failed" if saved.error else "saved", *["-"] * 3, length)
    parts: list[RenderableType] = [rows] if rows.row_count else []
    took = duration(found.total_time) if found.total_time else "nothing was changed"
    return Group(*parts, Text(f"{found.verb}: {took}"))
