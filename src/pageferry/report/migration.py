"""How a migration looks to a person: a bar while a round goes on, a line per round, and a table at the end."""

from __future__ import annotations

import msgspec
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pageferry.migration.events import (
    DirectIo,
    LargePagesEvent,
    MigrationResult,
    PostcopyEvent,
    ProgressEvent,
    RoundEvent,
    SetupEvent,
)
from pageferry.report.text import PlainView, named_values
from pageferry.report.units import duration, ms, rate, size

BAR = 32
"""Columns of the bar."""


class MigrationView(PlainView):
    """Shows events of `pageferry.migration.events`."""

    def __init__(self) -> None:
        self._rounds: list[str] = []

    def line(self, event: msgspec.Struct) -> str | None:
        """A line per phase and round; nothing for mere progress."""
        match event:
            case SetupEvent():
                return (
                    f"to {event.peer}: {size(event.present)} of {size(event.memory)} in memory, "
                    f"{event.large_pages} large pages, traces installed in {event.install_ms:.1f} ms"
                )
            case RoundEvent():
                return (
                    f"round {event.round}: {event.pages:,} pages, {size(event.sent)} in {duration(event.ms / 1e3)} "
                    f"({rate(event.mbps * 1e6 / 8)}), modified {rate(event.dirty_rate)}, {size(event.remaining)} left"
                    + (f", slowed down by {event.cpu_throttle_percentage} %" if event.cpu_throttle_percentage else "")
                )
            case ProgressEvent() | LargePagesEvent():
                return None
            case PostcopyEvent():
                return postcopy_line(event) if event.status != "postcopy-active" else None
            case _:
                return super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """The rounds so far, and a bar for the one under way."""
        shown = Table.grid()
        if (line := self.line(event)) is not None:
            self._rounds.append(line)
        for done in self._rounds:
            shown.add_row(Text(done))
        if isinstance(event, ProgressEvent):
            shown.add_row(_bar(event))
        if isinstance(event, PostcopyEvent) and event.status == "postcopy-active":
            shown.add_row(Text(postcopy_line(event)))
        return shown

    def result(self, result: msgspec.Struct) -> RenderableType:
        """The end of a migration as a table."""
        if not isinstance(result, MigrationResult):
            return super().result(result)
        return named_values(_rows(result))


class DemoView(MigrationView):
    """A migration, and at the end what matters most: whether anything was lost."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """The table of the migration, and the verdict."""
        intact, writes, checked = (getattr(result, name) for name in ("intact", "writes", "checked"))
        verdict = "every one is there" if intact else "SOME ARE LOST"
        line = f"{writes:,} writes, {checked:,} pages checked: {verdict}"
        return Group(super().result(result), Text(line, style="bold green" if intact else "bold red"))


def postcopy_line(event: PostcopyEvent) -> str:
    """How far the pages are of a workload that runs at the destination already."""
    if event.status == "postcopy-paused":
        return "postcopy-paused: it runs at the destination, and waits for its pages"
    if event.status == "postcopy-recover":
        return "postcopy-recover: linked again"
    return f"{event.status}: {size(event.remaining)} still to come, {event.postcopy_requests:,} pages asked for"


def _bar(event: ProgressEvent) -> RenderableType:
    bar = Table.grid(padding=(0, 1))
    progress = ProgressBar(total=max(event.total, 1), completed=event.done, width=BAR)
    bar.add_row(Text(f"round {event.round}"), progress, Text(rate(event.mbps * 1e6 / 8)))
    return bar


def _is(paused: bool) -> str:
    return "is paused, as before," if paused else "runs"


def _direct_io(direct: DirectIo) -> str:
    drained = f"{direct.drains} short pauses, {ms(direct.time)} in all, {ms(direct.longest)} the longest"
    return drained + (f"; {direct.pinned_pages:,} pinned pages" if direct.pinned_pages else "")


def _rows(result: MigrationResult) -> list[tuple[str, str]]:
    parts, large, populated = result.downtime_parts, result.large_pages, result.populated
    downtime = (
        f"{ms(result.downtime)}: stop {ms(parts.stop)}, last pages {ms(parts.last_pages)}, "
        f"state {ms(parts.device_state)}, populate {ms(parts.populate)}, resume {ms(parts.resume)}"
    )
    transferred = (
        f"{size(result.transferred)} of {size(result.memory)} at {rate(result.mbps * 1e6 / 8)}: "
        f"{result.normal:,} pages, {result.duplicate:,} of zeros, {result.skipped:,} not in memory"
    )
    trace = f"{result.trace.granularity}, installed in {ms(result.trace.install_ms)}"
    kept = f"{large.source} at the source, {large.destination} at the destination"
    mapped = f"{populated.large:,} large and {populated.small:,} small pages in {ms(populated.work_ms)}"
    rows = [
        ("migration", f"{result.workload} {result.status}, it {_is(result.paused)} at {result.peer}"),
        ("total time", f"{ms(result.total_time)} (set-up {ms(result.setup_time)})"),
        ("downtime", downtime),
        ("transferred", transferred),
        ("trace", f"{trace}; read {result.dirty_sync_count} times"),
        ("large pages", kept + (f", {large.fallbacks} could not be kept" if large.fallbacks else "")),
        ("populated", f"{populated.mode}: {mapped}"),
    ]
    if result.cpu_throttle_percentage:
        rows.append(("auto-converge", f"slowed down by up to {result.cpu_throttle_percentage} % while it was copied"))
    if (direct := result.direct_io).drains or direct.pinned_pages:
        rows.append(("direct I/O", _direct_io(direct)))
    if (late := result.postcopy) is not None:
        came = (
            f"{late.pages:,} pages in {ms(late.time)}, {result.postcopy_requests:,} requests; {late.faults:,} "
            f"accesses waited {late.service_us:.0f} us on average, 99 % less than {late.waits.p99_us:.0f} us, "
            f"{late.waits.longest_us:.0f} us at most"
        )
        rows.append(("post-copy", came))
    if (faults := result.faults_after_resume) is not None:
        rows.append(("faults in the first second", f"{faults.minor} minor, {faults.major} major"))
    return rows
