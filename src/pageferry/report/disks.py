"""Output of operations on disks: progress, and results of `disks commit` and `image delete`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pageferry.control.events import DisksCommitted, ImageDeleted
from pageferry.report.text import PlainView
from pageferry.report.units import size
from pageferry.workloads.events import DisksProgress

BAR = 32
"""Width of the progress bar, columns."""


class DisksView(PlainView):
    """View of operations on disks."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return None for progress."""
        return None if isinstance(event, DisksProgress) else super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return a progress bar."""
        return progress_of(event) if isinstance(event, DisksProgress) else super().live(event)

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return a line for each file of the result."""
        match result:
            case DisksCommitted():
                return Text("\n".join(_committed(result)))
            case ImageDeleted():
                return Text("\n".join(deleted(result)))
            case _:
                return super().result(result)


def progress_of(event: DisksProgress) -> RenderableType:
    """Return a progress bar with the number of bytes done."""
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(event.total, 1), completed=event.done, width=BAR)
    row.add_row(bar, Text(f"{size(event.done)} of {size(event.total)} of the disks"))
    return row


def _committed(result: DisksCommitted) -> Iterator[str]:
    for disk in result.disks:
        yield f"{result.workload}: disk {disk.name} uses {disk.path} again; removed {', '.join(disk.removed)}"
    for path in result.removed:
        yield f"{result.workload}: removed {path}, which was not in use"


def deleted(result: ImageDeleted) -> Iterator[str]:
    """Yield a line for the image, and for each file of its disks."""
    yield f"deleted {result.image}"
    for path in result.removed:
        yield f"deleted {path}, a copy of a disk"
    for file in result.kept:
        why = f"needed by {', '.join(file.needed_by)}" if file.needed_by else "the disk of a guest, writable again"
        yield f"kept {file.path}: {why}"
