"""Human-readable output of `pageferry image`."""

from __future__ import annotations

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.images.events import Difference, DiskSummary, Flattened, ImageSummary, Verification
from pageferry.report.text import PlainView, named_values
from pageferry.report.units import size


class ImageView(PlainView):
    """View of the results of `pageferry image`."""

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
            case Flattened():
                return Text(f"{result.path}: {size(result.length)}")
            case _:
                return super().result(result)


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
    return text + (f", modified {modified}" if modified is not None else "")


def _difference(found: Difference) -> RenderableType:
    if found.same:
        return Text("identical")
    lines = [Text(f"{found.pages} pages differ" + (", and the device state" if found.state_differs else ""))]
    lines += [Text(f"{region}: {size(length)} from byte {first}") for region, first, length in found.runs]
    return Group(*lines)
