"""Download of images from a store. Every storage block is verified, and a file appears only when it is complete.

The blocks of an image are read by few large requests: blocks that are close to each other in a pack are read together.
A range that cannot be read, or that has wrong contents, is read once more: it may have been damaged in transfer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pageferry.errors import ImageError, StoreError, UsageError
from pageferry.events import Listener
from pageferry.host import files
from pageferry.host.blocking import in_thread, on_thread
from pageferry.host.fault_points import fault_point
from pageferry.images.image import ImageFile, link_of, new_file, open_link
from pageferry.images.metadata import ImageIdentity
from pageferry.stores import blocks, frame
from pageferry.stores.address import ImageUrl
from pageferry.stores.blocks import BlockRecord
from pageferry.stores.events import ImagePulled, StoreProgress
from pageferry.stores.keys import NO_KEYS, Access
from pageferry.stores.layout import PackEntry
from pageferry.stores.manifests import Manifest
from pageferry.stores.references import open_image
from pageferry.stores.sealing import BlockOpener
from pageferry.stores.store import Store, gathered

RANGE = 8 << 20
"""Maximum length of a range of a pack that is read with one request, bytes."""
GAP = 256 << 10
"""Maximum number of unneeded bytes between two blocks that are read with one request."""
DOWNLOADS = 8
"""Maximum number of ranges that are read at a time. Each is in memory as a whole."""


@dataclass(frozen=True, slots=True)
class Range:
    """Range of a pack, with the storage blocks in it: number in the image and record."""

    pack: PackEntry
    start: int
    end: int
    blocks: tuple[tuple[int, BlockRecord], ...]


class Pull:
    """Download of one image with its parents to a directory."""

    def __init__(self, store: Store, url: ImageUrl, target: Path, listener: Listener, access: Access = NO_KEYS) -> None:
        self._store = store
        self._url = url
        self._access = access
        self._target = target
        self._listener = listener
        self._done = 0
        self._total = 0
        self._downloaded = 0
        self._requests = 0

    async def run(self) -> ImagePulled:
        """Download the parents that are missing, oldest first, and then the image. Raises ImageError, StoreError,
        WrongKey, UsageError if the image would replace one of its parents."""
        _, manifests = await open_image(self._store, self._url, self._access)
        paths = self._paths(manifests[0])
        missing = [
            (manifest, path)
            for manifest, path in zip(manifests, paths, strict=True)
            if path == self._target or not await in_thread(_exists, path, manifest.directory.identity)
        ]
        self._downloaded = sum(len(manifest.contents) for manifest in manifests)
        work = [(manifest, path, await in_thread(manifest.records)) for manifest, path in missing]
        self._total = sum(record.length for _, _, records in work for record in records)
        await self._write_all(work)
        await in_thread(lambda: ImageFile(self._target))  # verifies the references between the images
        return ImagePulled(
            url=str(self._url),
            image=str(self._target),
            manifest=manifests[0].digest,
            length=sum(manifest.directory.length for manifest, _ in missing),
            downloaded=self._downloaded,
            requests=self._requests,
            parents=[str(path) for _, path in missing if path != self._target],
            encrypted=bool(manifests[0].sealing.domain),
        )

    def _paths(self, manifest: Manifest) -> list[Path]:
        """Return the paths of the image and of its ancestors. A child finds its parent by the name of its file."""
        folder = self._target.parent
        parents = [folder / one.name for one in manifest.directory.ancestors]
        for path, one in zip(parents, manifest.directory.ancestors, strict=True):
            if one.name in (".", "..") or path.parent != folder:
                raise ImageError(f"cannot read {self._url}: invalid name of a parent {one.name!r}")
        if len({self._target, *parents}) <= len(parents):
            raise UsageError(
                f"cannot write {self._target}: a parent of {self._url} needs this name, or two of its parents have the "
                "same name; use another name, or another directory"
            )
        return [self._target, *parents]

    async def _write_all(self, work: Sequence[tuple[Manifest, Path, list[BlockRecord]]]) -> None:
        """Write the image and its missing parents, given in this order. When all files are complete and verified, they
        appear, oldest first. After an error, no file has appeared, unless a file cannot be given its name."""
        path = self._target
        try:
            with ExitStack() as stack:  # publishes the files in the reverse order
                opened = []
                for _, path, _ in work:
                    opened.append(stack.enter_context(new_file(path)))
                for (manifest, path, records), descriptor in reversed(list(zip(work, opened, strict=True))):  # noqa: B007
                    await self._fill(manifest, records, descriptor)
                    await on_thread(lambda: _check_synced(descriptor, manifest))  # noqa: B023
                    fault_point("store.downloaded")
                for manifest, path, _ in work[1:]:  # another download may have written another parent of this name
                    await in_thread(_exists, path, manifest.directory.identity)
        except OSError as error:
            raise ImageError(f"cannot write {path}: {error.strerror}") from error

    async def _fill(self, manifest: Manifest, records: list[BlockRecord], descriptor: int) -> None:
        await on_thread(lambda: write_frame(descriptor, manifest))
        wanted = ranges(enumerate(records), manifest.directory.packs, RANGE)
        await gathered((self._copy(one, descriptor, manifest.sealing) for one in wanted), DOWNLOADS)

    async def _copy(self, wanted: Range, descriptor: int, sealing: BlockOpener) -> None:
        """Download a range, verify its blocks and write them to the file."""
        where = f"{self._store.url}/{wanted.pack.key}"
        for last in (False, True):
            try:
                data = await self._read(wanted)
                await on_thread(lambda: write_blocks(descriptor, wanted, data, sealing))  # noqa: B023
                break
            except (ImageError, StoreError) as error:
                if last and isinstance(error, StoreError):
                    raise
                if last:
                    raise ImageError(
                        f"cannot download {self._url}: {where} is missing, or was damaged, truncated or replaced: "
                        f"{error}; upload the image again under another name, with `--reupload`"
                    ) from error
        self._done += sum(record.length for _, record in wanted.blocks)
        self._listener(StoreProgress(image=str(self._url), done=self._done, total=self._total))

    async def _read(self, wanted: Range) -> memoryview:
        """Read a range. Raises ImageError if the pack is missing or shorter than expected, StoreError."""
        self._requests += 1
        data = await self._store.get_range(wanted.pack.key, wanted.start, wanted.end - wanted.start)
        self._downloaded += len(data)
        return data


def _exists(path: Path, identity: ImageIdentity) -> bool:
    """Return whether a parent is in place. Raises ImageError if another file has its name."""
    if not os.path.lexists(path):
        return False
    try:
        found = open_link(path).identity
    except ImageError as error:
        raise ImageError(f"cannot write the parent {path}: there is another file of this name: {error}") from error
    if found != identity:
        raise ImageError(f"cannot write the parent {path}: another image has this name; use another directory")
    return True


def write_frame(descriptor: int, manifest: Manifest) -> None:
    """Write everything but the storage blocks into an empty file, which gets its full length. Raises ImageError,
    OSError."""
    directory = manifest.directory
    try:
        frame.write(descriptor, manifest.frame(), directory.chunks, directory.length)
    except ImageError as error:
        raise ImageError(f"cannot read {manifest.where}: {error}") from error


def ranges(
    numbered: Iterable[tuple[int, BlockRecord]], packs: Sequence[PackEntry], limit: int, gap: int = GAP
) -> Iterator[Range]:
    """Yield the ranges to read for blocks with their numbers, ordered by pack and offset.

    `limit`: maximum length of a range with several blocks, bytes; `gap`: maximum number of unneeded bytes between two
    blocks of a range.
    """
    placed = sorted(numbered, key=lambda one: (one[1].pack, one[1].start, one[0]))
    pending: list[tuple[int, BlockRecord]] = []
    end = 0
    for number, record in placed:
        stop = record.start + record.stored
        if pending:
            first = pending[0][1]
            if record.pack != first.pack or record.start > end + gap or stop - first.start > limit:
                yield Range(packs[first.pack], first.start, end, tuple(pending))
                pending = []
        end = max(end, stop) if pending else stop
        pending.append((number, record))
    if pending:
        yield Range(packs[pending[0][1].pack], pending[0][1].start, end, tuple(pending))


def write_blocks(descriptor: int, found: Range, data: memoryview, sealing: BlockOpener) -> None:
    """Verify and decrypt the blocks of a range, and write them. The header of a block is written last, so that a block
    with a header is complete unless the host has crashed. Raises ImageError for the first that is damaged, OSError."""
    for number, record in found.blocks:
        start = record.start - found.start
        block = memoryview(blocks.restore(data[start : start + record.stored], record, number, sealing))
        files.write_at(descriptor, block[blocks.HEADER :], record.offset + blocks.HEADER)
        files.write_at(descriptor, block[: blocks.HEADER], record.offset)


def _check_synced(descriptor: int, manifest: Manifest) -> None:
    """Sync a complete file, and check it. Raises ImageError, OSError."""
    os.fsync(descriptor)  # in this thread; the event loop does not wait for the sync of `new_file`
    check_file(descriptor, manifest)


def check_file(descriptor: int, manifest: Manifest) -> None:
    """Open a file that has at least its frame, and compare its identity and its block table with the manifest. Raises
    ImageError."""
    try:
        link = link_of(descriptor, Path(manifest.key))
    except ImageError as error:
        raise ImageError(f"cannot read {manifest.where}: it does not describe an image: {error}") from error
    table = [(record.offset, record.length) for record in manifest.records()]
    if link.identity != manifest.directory.identity or link.image.blocks != table:
        raise ImageError(f"cannot read {manifest.where}: it describes another image than its index")
    parent, ancestors = link.metadata.parent, manifest.directory.ancestors
    if (parent.identity if parent is not None else None) != (ancestors[0].identity if ancestors else None):
        raise ImageError(f"cannot read {manifest.where}: its parent is not that of the image")
