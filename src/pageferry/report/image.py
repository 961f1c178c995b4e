"""Human-readable output of `pageferry image`."""

from __future__ import annotations

from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.report.text import PlainView, named_values
from pageferry.report.units import size


class ImageView(PlainView):
    """View of the results of `pageferry image`."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return the result as a table or as lines."""
        fields: dict[str, Any] = msgspec.to_builtins(result)
        match fields["type"]:
            case "image":
                return _summary(fields)
            case "image-verify":
                verdict = f"{fields['path']}: {'intact' if fields['intact'] else 'DAMAGED'}"
                return Group(Text(verdict), *(Text(finding) for finding in fields["findings"]))
            case "image-diff":
                return _difference(fields)
            case _:
                return Text(f"{fields['path']}: {size(fields['length'])}")


def _summary(fields: dict[str, Any]) -> RenderableType:
    blocks = f"{fields['blocks']} storage blocks, page blocks of {size(fields['page-block'])}, {fields['codec']}"
    rows = [
        ("image", f"{fields['path']} ({size(fields['length'])})"),
        ("of", f"{fields['name']} ({fields['kind']}), {fields['created']}, state of {size(fields['state'])}"),
        ("id", f"{fields['id']}, digest {fields['digest']}"),
        ("blocks", blocks),
        ("parents", ", ".join(fields["parents"]) or "none"),
    ]
    if fields["paused"]:
        rows.append(("note", "the guest was paused when it was saved, and will be paused when it is restored"))
    if not fields["restorable"]:
        rows.append(("note", "memory only: the image can be inspected but not restored"))
    table = Table("region", "memory", *fields["regions"][0]["pages"], box=None)
    for region in fields["regions"]:
        table.add_row(region["name"], size(region["length"]), *(str(count) for count in region["pages"].values()))
    return Group(named_values(rows), table)


def _difference(fields: dict[str, Any]) -> RenderableType:
    if fields["same"]:
        return Text("identical")
    lines = [Text(f"{fields['pages']} pages differ" + (", and the device state" if fields["state-differs"] else ""))]
    lines += [Text(f"{region}: {size(length)} from byte {first}") for region, first, length in fields["runs"]]
    return Group(*lines)
