"""Output of verbs that describe workloads: `list`, `run` and `adopt`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
from rich.console import RenderableType

from pageferry.report.tables import table, with_notes
from pageferry.report.text import PlainView
from pageferry.report.units import size
from pageferry.workloads.events import BaseListing, EndedWorkload, Listing, WorkloadInfo

COLUMNS = ("NAME", "KIND", "PID", "STATUS", "MEMORY", "RESIDENT", "DEFERRED")


class WorkloadsView(PlainView):
    """View of workloads as a table with one row per workload."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the table of a `Listing`, a `BaseListing` or a single `WorkloadInfo`. Reasons are below the table."""
        if isinstance(result, BaseListing):
            return _bases(result)
        listing = result if isinstance(result, Listing) else Listing([result])  # type: ignore[list-item]
        rows = table(COLUMNS, right=("PID", "MEMORY", "RESIDENT", "DEFERRED"))
        for one in listing.workloads:
            sizes = (_size(one.memory), _size(one.resident), size(one.deferred) if one.deferred else "-")
            rows.add_row(one.name, one.kind, str(one.pid), one.status, *sizes)
        for ended in listing.ended:
            rows.add_row(ended.name, ended.kind, str(ended.pid), "ended", "-", "-", "-")
        reasons = with_notes(rows, [note for one in listing.workloads for note in _reasons(one)])
        return (
            with_notes(reasons, [(one.name, _end(one)) for one in listing.ended], style="")
            if listing.ended
            else reasons
        )


def _bases(listing: BaseListing) -> RenderableType:
    """Return the table of bases, with the names of the clones below."""
    columns = ("IMAGE", "PAGER", "CLONES", "MEMORY", "RESIDENT", "DEFERRED")
    rows = table(columns, right=columns[1:])
    notes = []
    for one in listing.bases:
        sizes = (size(one.memory), _size(one.resident), size(one.deferred) if one.deferred else "-")
        rows.add_row(one.image, "-" if one.pager is None else str(one.pager), str(len(one.clones)), *sizes)
        if one.stall_reason is not None:
            notes.append((one.image, one.stall_reason))
    return with_notes(rows, notes)


def _reasons(one: WorkloadInfo) -> Iterator[tuple[str, str]]:
    for note in (one.reason, one.stall_reason):
        if note is not None:
            yield one.name, note
    for disk in one.overlays:
        yield one.name, f"disk {disk.name}: writes to {disk.overlay}; {disk.frozen} is frozen"


def _end(one: EndedWorkload) -> str:
    """Return how and when a workload ended, and the end of its log."""
    if one.cause == "stopped":
        how = "stopped by pageferry"
    elif one.cause == "migrated":
        how = "migrated to another host"
    elif one.signal is not None:
        how = f"killed by {one.signal}"
    elif one.exit_code is not None:
        how = f"exited with code {one.exit_code}"
    else:
        how = "exited, with an unknown code,"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.time))
    log = f"; see `pageferry logs {one.name}`" if one.log else ", without a log"
    last = f"; its last line: {one.last_line}" if one.last_line is not None else ""
    return f"{how} {'at' if one.exact else 'before'} {when}{log}{last}"


def _size(count: int | None) -> str:
    return "-" if count is None else size(count)
