"""Human-readable output of operations on stores and on the cache of their images."""

from __future__ import annotations

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.report.text import PlainView
from pageferry.report.units import size
from pageferry.stores.events import (
    CacheCleared,
    CacheListing,
    GarbageCollected,
    ImagePulled,
    ImagePushed,
    StoreListing,
    StoreProgress,
)


class CacheView(PlainView):
    """View of the results of `pageferry cache`."""

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return a table of the images, or a line for each entry that was not removed."""
        match result:
            case CacheListing():
                return _cached(result)
            case CacheCleared():
                kept = [f"kept {path}, which is in use" for path in result.kept]
                return Text("\n".join([f"removed {len(result.removed)} images, {size(result.freed)}", *kept]))
            case _:
                return super().result(result)


def progress(event: StoreProgress) -> str:
    """Return the progress of a transfer."""
    return f"{event.image}: {size(event.done)} of {size(event.total)}"


def stored(result: msgspec.Struct) -> RenderableType | None:
    """Return the output of an operation on a store; None for other results."""
    match result:
        case ImagePushed(existed=True):
            return Text(f"{result.url}: already in the store\n{result.url}@{result.manifest}")
        case ImagePushed():
            parents = f", {result.parents} parents" if result.parents else ""
            encrypted = ", encrypted" if result.encrypted else ""
            return Text(
                f"{result.url}: {size(result.uploaded)} uploaded of {size(result.length)}, "
                f"{result.uploaded_blocks} of {result.blocks} storage blocks{parents}{encrypted}\n"
                f"{result.url}@{result.manifest}"
            )
        case ImagePulled():
            text = f"{result.image}: {size(result.length)}, {size(result.downloaded)} downloaded"
            return Text("\n".join([text, *(f"{parent}: parent" for parent in result.parents)]))
        case StoreListing():
            return _listing(result)
        case GarbageCollected():
            return Text(
                f"{result.store}: {result.deleted} objects deleted ({size(result.freed)}), {result.condemned} marked "
                f"for deletion ({size(result.condemned_bytes)}), {result.recent} unneeded but recent, {result.kept} "
                f"needed ({size(result.kept_bytes)})"
            )
    return None


def _listing(found: StoreListing) -> RenderableType:
    table = Table("name", "of", "created", "pushed", "length", "parents", box=None)
    for image in found.images:
        of = f"{image.workload} ({image.kind})" if image.kind is not None else "encrypted"
        created = image.created or "-"
        table.add_row(image.name, of, created, image.pushed, size(image.length), str(image.parents))
    lines = [Text(f"unreadable: {reason}") for reason in found.unreadable]
    return Group(table if found.images else Text(f"{found.store}: no images"), *lines)


def _cached(found: CacheListing) -> RenderableType:
    table = Table("image", "present", "of", "file", box=None)
    for image in found.images:
        of = "complete" if image.complete else size(image.contents)
        table.add_row(image.url, size(image.length), of, image.path)
    total = Text(f"{found.folder}: {size(found.length)} of at most {size(found.limit)}")
    return Group(table, total) if found.images else total
