"""Human-readable output of `pageferry image`."""

from __future__ import annotations

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.control.events import ImageDeleted
from pageferry.images.events import (
    Difference,
    DiskSummary,
    ExportedSnapshot,
    Flattened,
    ImageSummary,
    ImportedSnapshot,
    Verification,
)
from pageferry.report.disks import deleted
from pageferry.report.stores import progress, stored
from pageferry.report.text import PlainView, named_values
from pageferry.report.units import size
from pageferry.stores.events import StoreProgress


class ImageView(PlainView):
    """View of the results of `pageferry image`."""

    def line(self, event: msgspec.Struct) -> str | None:
        """Return None for progress."""
        return None if isinstance(event, StoreProgress) else super().line(event)

    def live(self, event: msgspec.Struct) -> RenderableType | None:
        """Return the progress of a transfer."""
        if isinstance(event, StoreProgress):
            return progress(event)
        return super().live(event)

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return a summary as a table, and any other result as lines."""
        match result:
            case ImageSummary():
                return _summary(result)
            case Verification():
                summary = f"{result.path}: {'intact' if result.intact else 'DAMAGED'}"
                return Group(Text(summary), *(Text(finding) for finding in result.findings))
            case Difference():
                return _difference(result)
            case ImportedSnapshot():
                return Text(_imported(result))
            case ExportedSnapshot():
                return Text(f"{result.memory}: {size(result.length)}; {result.vmstate}")
            case Flattened():
                return Text(f"{result.path}: {size(result.length)}")
            case ImageDeleted():
                return Text("\n".join(deleted(result)))
            case _:
                return stored(result) or super().result(result)


def _summary(image: ImageSummary) -> RenderableType:
    rows = [
        ("image", f"{image.path} ({size(image.length)})"),
        ("of", f"{image.name} ({image.kind}), {image.created}, state of {size(image.state)}"),
        ("id", f"{image.id}, digest {image.digest}"),
        ("blocks", f"{image.blocks} storage blocks, page blocks of {size(image.page_block)}, {image.codec}"),
        ("parents", ", ".join(image.parents) or "none"),
    ]
    rows += [("disk", _disk(disk)) for disk in image.disks or ()]
    if image.paused:
        rows.append(("note", "the guest was paused when it was saved, and will be paused when it is restored"))
    if not image.restorable:
        rows.append(("note", "memory only: the image can be inspected but not restored"))
    table = Table("region", "memory", *image.regions[0].pages, box=None)
    for region in image.regions:
        table.add_row(region.name, size(region.length), *(str(count) for count in region.pages.values()))
    return Group(named_values(rows), table)


def _disk(disk: DiskSummary) -> str:
    name = disk.name or disk.id
    if not disk.layers:
        return f"{name}: empty"
    chain = " over ".join(f"{layer.path} ({layer.format})" for layer in disk.layers)
    if disk.in_state:
        return f"{name}: {chain}, part of the state"
    text = f"{name}: {chain}, {size(disk.size)}" + (", read-only" if disk.read_only else "")
    modified = disk.layers[0].modified
    if disk.saved:
        text += ", frozen" if disk.frozen else f", copied to {disk.saved[0].path} ({disk.saved[0].format})"
        return text + (f", needed by {', '.join(disk.needed_by)}" if disk.needed_by else "")
    return text + (f", modified {modified}" if modified is not None else "")


def _imported(result: ImportedSnapshot) -> str:
    based = f", based on {result.parent}" if result.parent is not None else ""
    return (
        f"{result.path}: {size(result.length)} for {size(result.memory)} of memory, {result.stored} pages stored{based}"
    )


def _difference(found: Difference) -> RenderableType:
    if found.same:
        return Text("identical")
    lines = [Text(f"{found.pages} pages differ" + (", and the device state" if found.state_differs else ""))]
    lines += [Text(f"{region}: {size(length)} from byte {first}") for region, first, length in found.runs]
    return Group(*lines)
