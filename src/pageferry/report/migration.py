"""Human-readable output of a migration: a progress bar, a line per round, and a table of the result."""

from __future__ import annotations

import msgspec
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pageferry.demo.events import DemoResult
from pageferry.migration.events import (
    CloneMove,
    DirectIo,
    DiskProgressEvent,
    LargePagesEvent,
    Listening,
    MigrationResult,
    PostcopyEvent,
    ProgressEvent,
    Received,
    RoundEvent,
    SetupEvent,
)
from pageferry.report.text import PlainView, named_values
from pageferry.report.units import duration, ms, rate, size, us

BAR = 32
"""Width of the progress bar, columns."""


class MigrationView(PlainView):
    """View of the events and the result of a migration."""

    def __init__(self) -> None:
        self._rounds: list[str] = []
        self._bars: dict[type[msgspec.Struct], RenderableType] = {}
        """Latest progress bar, of the current round and of the disks, by the type of its event."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return a line for the end of a phase or round; None for progress."""
        match event:
            case SetupEvent():
                return (
                    f"to {event.peer}: {size(event.present)} of {size(event.memory)} present, "
                    f"{event.large_pages} huge pages, write traces installed in {event.install_ms:.1f} ms"
                )
            case RoundEvent(pages=0):
                return None
            case RoundEvent(postcopy=True):
                return f"post-copy: {_sent(event)}"
            case RoundEvent():
                return (
                    f"round {event.round}: {_sent(event)}, modified {rate(event.dirty_rate)}, "
                    f"{size(event.remaining)} remaining"
                    + (f", throttled by {event.cpu_throttle_percentage} %" if event.cpu_throttle_percentage else "")
                )
            case ProgressEvent() | LargePagesEvent() | DiskProgressEvent():
                return None
            case PostcopyEvent():
                return postcopy_line(event) if event.status != "postcopy-active" else None
            case _:
                return super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return the lines of completed rounds, and a progress bar for the current round."""
        shown = Table.grid()
        if (line := self.line(event)) is not None:
            self._rounds.append(line)
        for done in self._rounds:
            shown.add_row(Text(done))
        self._bars |= {type(event): bar} if (bar := _bar(event)) is not None else {}
        if isinstance(event, RoundEvent):
            self._bars.pop(ProgressEvent, None)
        for bar in self._bars.values():
            shown.add_row(bar)
        if isinstance(event, PostcopyEvent) and event.status == "postcopy-active":
            shown.add_row(Text(postcopy_line(event)))
        return shown

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the result as a table."""
        if not isinstance(result, MigrationResult):
            return super().result(result)
        return named_values(_rows(result))


class DemoView(MigrationView):
    """View of a migration of the built-in workload, and of the verification of its memory."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the table of the migration, and a line that states whether writes were lost."""
        if not isinstance(result, DemoResult):
            return super().result(result)
        outcome = "no lost writes" if result.intact else "WRITES LOST"
        line = f"{outcome}: {result.writes:,} writes, {result.checked:,} pages verified"
        return Group(super().result(result), Text(line, style="bold green" if result.intact else "bold red"))


class ReceiveView(PlainView):
    """View of `pageferry receive`: one sentence per event."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return the sentence for an event; None for progress."""
        match event:
            case Listening():
                return f"{event.workload}: listening on {event.address}"
            case Received():
                return f"{event.workload}: received, {'still paused' if event.paused else 'running'}"
            case PostcopyEvent():
                return postcopy_line(event) if event.status != "postcopy-active" else None
            case _:
                return super().line(event)


def postcopy_line(event: PostcopyEvent) -> str:
    """Return the state and progress of a post-copy migration as a line."""
    if event.status == "postcopy-paused":
        return "postcopy-paused: the workload waits at the destination for deferred pages"
    if event.status == "postcopy-recover":
        return "postcopy-recover: reconnected"
    return f"{event.status}: {size(event.remaining)} deferred, {event.postcopy_requests:,} pages requested"


def _sent(event: RoundEvent) -> str:
    speed = rate(event.mbps * 1e6 / 8)
    return f"{event.pages:,} pages, {size(event.sent)} in {duration(event.ms / 1e3)} ({speed})"


def _bar(event: msgspec.Struct) -> RenderableType | None:
    """Return the progress bar for an event; None for an event of another kind."""
    match event:
        case ProgressEvent():
            what, more = f"round {event.round}", ""
        case DiskProgressEvent():
            what, more = "disks", f", {size(event.remaining)} remaining"
        case _:
            return None
    bar = Table.grid(padding=(0, 1))
    progress = ProgressBar(total=max(event.total, 1), completed=event.done, width=BAR)
    bar.add_row(Text(what), progress, Text(rate(event.mbps * 1e6 / 8) + more))
    return bar


def _state(paused: bool) -> str:
    return "still paused" if paused else "running"


def _direct_io(direct: DirectIo) -> str:
    drained = f"{direct.drains} short pauses, {ms(direct.time)} in total, at most {ms(direct.longest)}"
    return drained + (f"; {direct.pinned_pages:,} pinned pages" if direct.pinned_pages else "")


def _clone(clone: CloneMove) -> str:
    if clone.shared:
        return f"{size(clone.private)} private; shares the memory of {clone.image} at the destination too"
    return f"separate memory at the destination: {clone.reason}"


def _disks(result: MigrationResult) -> list[tuple[str, str]]:
    if not result.disks:
        return []
    kept = ", ".join(f"{disk.path} ({disk.name})" for disk in result.disks)
    copied = f"{size(sum(disk.size for disk in result.disks))} copied, {size(result.disks_transferred)} sent"
    return [
        ("disks", f"{copied}, completed in {ms(result.downtime_parts.disks)} of the downtime"),
        ("disks at the source", f"{kept}: unused, with the contents of the switch-over"),
    ]


def _rows(result: MigrationResult) -> list[tuple[str, str]]:
    parts, large, populated = result.downtime_parts, result.large_pages, result.populated
    downtime = (
        f"{ms(result.downtime)}: stop {ms(parts.stop)}, last pages {ms(parts.last_pages)}, "
        f"state {ms(parts.device_state)}, populate {ms(parts.populate)}, resume {ms(parts.resume)}"
    )
    transferred = (
        f"{size(result.transferred)} of {size(result.memory)} at {rate(result.mbps * 1e6 / 8)}: "
        f"{result.normal:,} pages, {result.duplicate:,} zero pages, {result.skipped:,} not present"
    )
    trace = f"{result.trace.granularity}, installed in {ms(result.trace.install_ms)}"
    kept = f"{large.source} at the source, {large.destination} at the destination"
    mapped = f"{populated.large:,} huge and {populated.small:,} base pages in {ms(populated.work_ms)}"
    rows = [
        ("migration", f"{result.workload} {result.status}, {_state(result.paused)} at {result.peer}"),
        ("total time", f"{ms(result.total_time)} (set-up {ms(result.setup_time)})"),
        ("downtime", downtime),
        ("transferred", transferred),
        ("trace", f"{trace}; collected {result.dirty_sync_count} times"),
        ("huge pages", kept + (f", {large.fallbacks} not preserved" if large.fallbacks else "")),
        ("populated", f"{populated.mode}: {mapped}"),
    ]
    if result.clone is not None:
        rows.append(("clone", _clone(result.clone)))
    rows += _disks(result)
    if result.cpu_throttle_percentage:
        rows.append(("auto-converge", f"throttled by up to {result.cpu_throttle_percentage} %"))
    if (direct := result.direct_io).drains or direct.pinned_pages:
        rows.append(("direct I/O", _direct_io(direct)))
    if (post := result.postcopy) is not None:
        fetched = (
            f"{post.pages:,} pages in {ms(post.time)}, {result.postcopy_requests:,} requests; {post.faults:,} faults, "
            f"mean {us(post.service_us)}, p99 {us(post.waits.p99_us)}, maximum {us(post.waits.longest_us)}"
        )
        rows.append(("post-copy", fetched))
    if (faults := result.faults_after_resume) is not None:
        rows.append(("faults in the first second", f"{faults.minor:,} minor, {faults.major:,} major"))
    return rows
