"""Human-readable output of `pageferry top`: a line for the host, and a table of workloads and operations."""

from __future__ import annotations

import time

import msgspec
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from pageferry.host.jobs import Job
from pageferry.report.tables import narrow, table, with_notes
from pageferry.report.text import PlainView
from pageferry.report.units import duration, rate, size
from pageferry.workloads.events import HostMemory, Overview, WorkloadMemory

BAR = 16
"""Width of a bar, columns."""
MAX_NAME = 24
"""Maximum width of a name in the tables, columns."""
COLUMNS = ("NAME", "KIND", "PID", "MAPPED", "HUGE", "DEFERRED", "DIRTIED", "OPERATION")


class TopView(PlainView):
    """View of an `Overview`: memory of the host, workloads and running operations."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return one line per workload, with the time of day."""
        if not isinstance(event, Overview):
            return super().line(event)
        clock = time.strftime("%H:%M:%S", time.localtime(event.time))
        return "\n".join(f"{clock} {_words(one)}" for one in event.workloads) or f"{clock} no workloads"

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return the complete display, as for the result."""
        return self.result(event)

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the complete display: a line for the host, and the table of workloads."""
        if not isinstance(result, Overview):
            return super().result(result)
        operations = _operations(result)
        stalled = [(one.name, one.stall_reason) for one in result.workloads if one.stall_reason is not None]
        parts = [_host(result.host), Text(), with_notes(_table(result), stalled)]
        return Group(*parts, *([Text(), operations] if operations is not None else []))


def _host(host: HostMemory) -> RenderableType:
    used = host.total - host.available
    row = Table.grid(padding=(0, 1))
    swap = f", swap {size(host.swap - host.swap_free)} of {size(host.swap)}" if host.swap else ", no swap"
    usage = f"{size(used)} of {size(host.total)} in use, {size(host.large)} on huge pages{swap}"
    row.add_row(Text("host", style="bold"), ProgressBar(total=host.total, completed=used, width=BAR), Text(usage))
    return row


def _table(now: Overview) -> RenderableType:
    if not now.workloads:
        return Text("no workloads: start one with `pageferry run`, `receive`, `restore` or `adopt`")
    rows = table(COLUMNS, right=COLUMNS[2:7], gap=2, max_name=MAX_NAME)
    rows.columns[-1].no_wrap = False
    for one in now.workloads:
        rows.add_row(
            Text(one.name),
            one.kind,
            str(one.pid),
            _or_dash(one.memory),
            f"{one.large / one.memory:.0%}" if one.memory and one.large is not None else "-",
            size(one.deferred) if one.deferred else "-",
            rate(one.dirty_rate) if one.dirty_rate is not None else "-",
            Text(", ".join(job.verb for job in one.jobs) or "-"),
        )
    return narrow(rows)


def _operations(now: Overview) -> RenderableType | None:
    """Return a row for each running operation; None if there are none."""
    rows = Table.grid(Column(max_width=MAX_NAME, overflow="fold"), padding=(0, 1))
    for one in now.workloads:
        for job in one.jobs:
            done = ProgressBar(total=1.0, completed=job.fraction, width=BAR) if job.fraction is not None else Text()
            words = Text(_words_of(job, now.time), style="dim")
            rows.add_row(Text(one.name, style="bold"), Text(job.verb, style="cyan"), Text(job.phase), done, words)
    return narrow(rows) if rows.rows else None


def _or_dash(count: int | None) -> str:
    return "-" if count is None else size(count)


def _words_of(job: Job, now: float) -> str:
    words = [f"{job.fraction:.0%}"] if job.fraction is not None else []
    words += [rate(job.rate)] if job.rate is not None else []
    return ", ".join([*words, duration(max(now - job.started_at, 0))])


def _words(one: WorkloadMemory) -> str:
    words = [f"{one.name} ({one.kind}, {one.pid}): {_or_dash(one.memory)}"]
    if one.large is not None:
        words.append(f"{size(one.large)} on huge pages")
    if one.deferred:
        words.append(f"{size(one.deferred)} deferred")
    if one.dirty_rate is not None:
        words.append(f"{rate(one.dirty_rate)} dirtied")
    words += [
        f"{job.verb}: {job.phase}" + (f" {job.fraction:.0%}" if job.fraction is not None else "") for job in one.jobs
    ]
    return ", ".join([*words, *([one.stall_reason] if one.stall_reason else [])])
