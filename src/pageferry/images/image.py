"""Image files: open an image with its parents, read, verify, compare and flatten it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec

from pageferry._engine import Finding, Image, ImageChain, WrittenImage
from pageferry.errors import ImageError, UsageError
from pageferry.host import files
from pageferry.host.fault_points import fault_point
from pageferry.images import metadata
from pageferry.images.metadata import ImageIdentity, Metadata, Parent
from pageferry.memory.regions import SMALL_PAGE

if TYPE_CHECKING:
    import socket

MAX_CHAIN = 256
"""Maximum number of images in a chain."""
SLICE = 8192
"""Number of pages processed per engine call (32 MiB). Progress is reported between the calls."""
MAX_FINDINGS = 20
"""Maximum number of findings that `verify` returns."""

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Function that is called with the number of pages done and the total."""


def _silent(_done: int, _total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Link:
    """Image in a chain."""

    path: Path
    image: Image
    metadata: Metadata

    @property
    def identity(self) -> ImageIdentity:
        """Identity of the image."""
        return ImageIdentity(id=self.image.id.hex(), digest=f"{self.image.digest:016x}")


class ImageFile:
    """Image with its parents. The constructor verifies everything except the contents of pages.

    Raises ImageError if the file is missing, not an image, truncated, damaged or of another version. Also raises it if
    a parent is missing, is not the image that the child was built on, or is its own descendant.
    """

    connection: socket.socket | None = None
    """Connection to the provider of storage blocks (`pageferry.stores.lazy_image`); None if all are in the files."""

    def __init__(self, path: str | Path) -> None:
        self._verify(list(_chain(open_link(Path(path)), _open_parent)))

    @classmethod
    def from_files(cls, files: Sequence[tuple[int, Path]]) -> Self:
        """Create the object from images that another process has opened: descriptor and path of each, child first.

        No path is resolved: if a file has been replaced after it was opened, the opened file is read. The descriptors
        are duplicated. Raises ImageError in the same cases as the constructor, and if a descriptor is missing.
        """
        parents = iter(files[1:])

        def open_parent(child: Link, parent: Parent) -> Link:
            descriptor, path = next(parents, (None, None))
            if descriptor is None or path is None:
                raise ImageError(f"cannot open {child.path}: the descriptor of its parent {parent.path} is missing")
            return _checked_parent(child, parent, link_of(descriptor, path))

        self = cls.__new__(cls)
        self._verify(list(_chain(link_of(*files[0]), open_parent)))
        return self

    def _verify(self, links: list[Link]) -> None:
        self.links = links
        self.chain = _checked(self.path, lambda: ImageChain([link.image for link in self.links]))
        expected = sum(region.length for region in self.metadata.regions) // SMALL_PAGE
        if self.pages != expected or self.links[0].image.regions != len(self.metadata.regions):
            raise ImageError(
                f"{self.path} is damaged: its page map has {self.pages} pages in {self.links[0].image.regions} "
                f"regions, its metadata {expected} pages in {len(self.metadata.regions)}; take another checkpoint"
            )

    @property
    def is_fetched(self) -> bool:
        """Whether storage blocks are fetched from a store when they are needed."""
        return self.connection is not None

    @property
    def path(self) -> Path:
        """Path of the image that was opened."""
        return self.links[0].path

    @property
    def image(self) -> Image:
        """Image that was opened, the first of the chain."""
        return self.links[0].image

    @property
    def metadata(self) -> Metadata:
        """Metadata of the image."""
        return self.links[0].metadata

    @property
    def pages(self) -> int:
        """Number of base pages of all regions. Pages are numbered across all regions."""
        return self.image.pages

    @property
    def identity(self) -> ImageIdentity:
        """Identity of the image, which determines its parents too."""
        return self.links[0].identity

    def as_parent(self) -> Parent:
        """Return the reference to this image for its children: id, digest and path."""
        return Parent(id=self.identity.id, digest=self.identity.digest, path=str(self.path.absolute()))

    def state(self) -> bytes:
        """Return the state of the workload; empty if the image contains only memory. Raises ImageError."""
        return self.section(metadata.STATE) or b""

    def section(self, kind: int) -> bytes | None:
        """Return the contents of a section (see `metadata`), or None if there is none. Raises ImageError."""
        return _checked(self.path, lambda: self.image.section(kind))

    def read(self, first: int, count: int) -> bytes:
        """Return the verified contents of pages. Absent pages read as zeros. Raises ImageError for a damaged page."""
        return _checked(self.path, lambda: self.chain.read(first, count))

    def check_pages(self, first: int, count: int) -> None:
        """Read pages, unless all of them are absent or zero. Raises ImageError for a damaged page."""
        found = self.image.count(first, count)
        if found.data + found.same_as + found.in_parent:
            self.read(first, count)

    def verify(self, progress: Progress = _silent) -> list[str]:
        """Verify every byte of every image of the chain. Return a description of each error; stop at `MAX_FINDINGS`
        errors."""
        found: list[str] = []
        for number in range(len(self.links)):
            found += self.verify_link(number, progress, MAX_FINDINGS - len(found))
            if len(found) >= MAX_FINDINGS:
                break
        return found

    def verify_link(self, number: int, progress: Progress = _silent, limit: int = MAX_FINDINGS) -> list[str]:
        """Verify every byte of one image of the chain. Return a description of each error, and stop at `limit`
        errors."""
        found: list[str] = []
        link, chain = self.links[number], ImageChain([other.image for other in self.links[number:]])
        for start in range(0, chain.stored, SLICE):
            progress(start, chain.stored)
            found += [_finding(link, wrong) for wrong in chain.verify(start, SLICE, limit)]
            if len(found) >= limit:
                return found
        found += [_finding(link, wrong) for wrong in chain.verify_unused()]
        return found + damaged_sections(link)

    def differences(self, other: Self, progress: Progress = _silent) -> list[tuple[int, int]]:
        """Return the runs (start, end) of pages whose contents differ. Raises ImageError if the regions differ."""
        ours, theirs = ([(region.name, region.length) for region in image.metadata.regions] for image in (self, other))
        if ours != theirs:
            raise ImageError(f"cannot compare {self.path} with {other.path}: their regions differ: {ours} and {theirs}")
        runs: list[tuple[int, int]] = []
        for start in range(0, self.pages, SLICE):
            progress(start, self.pages)
            count = min(SLICE, self.pages - start)
            runs += _checked(self.path, lambda: self.chain.differences(other.chain, start, count))  # noqa: B023
        return runs

    def check_target(self, path: Path) -> None:
        """Raise UsageError if a new image at `path` would replace this image or one of its parents."""
        try:
            found = os.stat(path)
        except OSError:  # no file to replace, or an error that the write will report
            return
        if any(os.path.samestat(found, os.fstat(link.image.fileno())) for link in self.links):
            raise UsageError(
                f"cannot write {path}: it would replace an image in the chain of {self.path}, which other images may "
                "need; use another name"
            )

    def flatten(self, descriptor: int, codec: str | None = None) -> WrittenImage:
        """Write an image with the same contents and no parent to an empty file. Raises ImageError, OSError."""
        sections = [(metadata.METADATA, metadata.encode(msgspec.structs.replace(self.metadata, parent=None)))]
        kept = (metadata.STATE, metadata.LARGE_UNITS)
        sections += [(kind, contents) for kind in kept if (contents := self.section(kind)) is not None]
        regions = [region.length // SMALL_PAGE for region in self.metadata.regions]
        return _checked(
            self.path,
            lambda: self.chain.flatten(
                descriptor, os.urandom(16), regions, sections, codec=codec or self.metadata.codec
            ),
        )


def new_file(path: Path) -> AbstractContextManager[int]:
    """Open a new image, which appears at `path` when the block ends without an error. Raises OSError."""
    return files.new_file(path, linked=lambda: fault_point("image.linked"))


def open_link(path: Path) -> Link:
    """Open an image without its parents. Raises ImageError."""
    try:
        descriptor = files.open_regular(path)
    except OSError as error:
        raise ImageError(f"cannot open {path}: {error.strerror}") from error
    try:
        return link_of(descriptor, path)
    finally:
        os.close(descriptor)


def link_of(descriptor: int, path: Path) -> Link:
    """Return the link for an open file, whose descriptor is duplicated. Raises ImageError."""
    image = _checked(path, lambda: Image(descriptor))
    return Link(path, image, _checked(path, lambda: metadata.decode(image.section(metadata.METADATA))))


def _chain(link: Link, open_parent: Callable[[Link, Parent], Link]) -> Iterator[Link]:
    """Yield the image and its ancestors, child first. Raises ImageError if the chain is too long or contains an image
    twice."""
    path = link.path
    seen = {link.image.id}
    yield link
    while (parent := link.metadata.parent) is not None:
        link = open_parent(link, parent)
        if link.image.id in seen or len(seen) >= MAX_CHAIN:
            raise ImageError(f"cannot open {path}: its chain of parents is too long, or contains {link.path} twice")
        seen.add(link.image.id)
        yield link


def beside(child: Path, parent: str | Path) -> Path:
    """Return the expected path of an image's parent: its file name, in the directory of the child.

    The directory recorded in the image is ignored. Otherwise, an image from another host could cause any file to be
    opened.
    """
    return child.parent / Path(parent).name


def _open_parent(child: Link, parent: Parent) -> Link:
    path = beside(child.path, parent.path)
    try:
        planted = os.lstat(path).st_uid not in (0, os.geteuid()) and path.is_symlink()
    except (OSError, ValueError):
        raise ImageError(
            f"cannot open {child.path}: its parent {path.name} is not in the same directory (its path was "
            f"{parent.path}); put that image, or a symbolic link to it, into {child.path.parent}"
        ) from None
    if planted:
        raise ImageError(f"cannot open {path}: it is a symbolic link that belongs to another user; replace it")
    return _checked_parent(child, parent, open_link(path))


def _checked_parent(child: Link, parent: Parent, link: Link) -> Link:
    """Return the link if it is the parent that the child refers to. Raises ImageError."""
    if link.identity != parent.identity:
        raise ImageError(
            f"cannot open {child.path}: its parent {link.path} has been replaced or changed; restore the original image"
        )
    return link


def _checked(path: Path, call: Callable[[], T]) -> T:
    """Return the result of an engine call, with its errors translated to ImageError."""
    try:
        return call()
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except ValueError as error:
        raise ImageError(f"{path}: {error}") from error
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error


def _finding(link: Link, finding: Finding) -> str:
    where = "" if finding.page is None else f"page {finding.page}: "
    return f"{link.path}: {where}{finding.message}"


def damaged_sections(link: Link) -> list[str]:
    """Verify the sections of an image other than its index. Return a description of each error."""
    found = []
    for kind in (metadata.METADATA, metadata.STATE, metadata.LARGE_UNITS):
        try:
            link.image.section(kind)
        except (ValueError, OSError) as error:
            found.append(f"{link.path}: {error}")
    return found
