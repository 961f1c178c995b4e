"""Images written page by page, with pages of every class."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pageferry._engine import ImageWriter
from pageferry.images import metadata
from pageferry.images.image import new_file, open_link
from pageferry.images.metadata import Metadata, Parent, RegionInfo

PAGE = 4096
ABSENT, ZERO, PATTERN, SAME_AS, DATA = range(5)


@dataclass
class Maker:
    """Writer of an arena image of `pages` pages. A restore of the image must produce the memory in `contents`."""

    pages: int
    seed: int = 1
    parent: Path | None = None
    codec: str = "lz4"
    storage_block: int = 1 << 20
    state: bytes = b"state"
    classes: list[int] = field(default_factory=list)
    contents: np.ndarray = field(init=False)
    inherited: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.seed)
        if not self.classes:
            self.classes = generator.choice(5, self.pages, p=[0.1, 0.1, 0.1, 0.1, 0.6]).tolist()
            self.classes[0] = DATA
        self.contents = np.zeros((self.pages, PAGE // 8), dtype=np.uint64)
        self.inherited = [False] * self.pages
        for page, kind in enumerate(self.classes):
            if kind == PATTERN:
                self.contents[page] = 1 + page
            elif kind == DATA:
                self.contents[page] = generator.integers(1, 1 << 62, PAGE // 8, dtype=np.uint64)
                self.contents[page, 64:] = page  # compressible

    def build_on(self, parent: Maker, path: Path, share: float = 0.5) -> None:
        """Inherit a fraction `share` of the pages from the image at `path`, which `parent` has written."""
        self.parent = path
        for page in np.random.default_rng(self.seed).choice(self.pages, int(self.pages * share), replace=False):
            self.inherited[page] = True
            self.contents[page] = parent.contents[page]
            self.classes[page] = parent.classes[page]

    def write(self, path: Path, large: bool = False) -> Path:
        """Write the image, with its data pages in random order, and return its path.

        `large`: record every unit as a huge page.
        """
        order = np.random.default_rng(self.seed).permutation(self.pages).tolist()
        data = [page for page in order if self.classes[page] == DATA and not self.inherited[page]]
        entries = [(kind, inherited, 0, 0, 0) for kind, inherited in zip(self.classes, self.inherited, strict=True)]
        with new_file(path) as descriptor:
            writer = ImageWriter(
                descriptor, secrets.token_bytes(16), codec=self.codec, storage_block=self.storage_block
            )
            for start in range(0, len(data), self.storage_block // PAGE):
                group = data[start : start + self.storage_block // PAGE]
                number = writer.append(0, [(page, self.contents[page].tobytes()) for page in group])
                for slot, page in enumerate(group):
                    entries[page] = (DATA, False, 7, number, slot)
            for page, kind in enumerate(self.classes):
                if kind == PATTERN:
                    entries[page] = (PATTERN, self.inherited[page], 1 + page, 0, 0)
                elif kind == SAME_AS and not self.inherited[page]:
                    other = data[page % len(data)]
                    self.contents[page] = self.contents[other]
                    entries[page] = (SAME_AS, False, *entries[other][2:])
            writer.section(metadata.METADATA, metadata.encode(self._metadata()))
            writer.section(metadata.STATE, self.state)
            if large:
                units = self.pages * PAGE >> 21
                writer.section(metadata.LARGE_UNITS, bytes([255] * (units // 8) + [(1 << units % 8) - 1]))
            writer.finish(1, entries)
        return path

    def _metadata(self) -> Metadata:
        parent = None
        if self.parent is not None:
            image = open_link(self.parent).image
            parent = Parent(id=image.id.hex(), digest=f"{image.digest:016x}", path=str(self.parent))
        region = RegionInfo(name="arena", length=self.pages * PAGE, page_size=PAGE)
        return Metadata(
            kind="arena",
            name="made",
            details={},
            regions=[region],
            created=time.time(),
            codec=self.codec,  # type: ignore[arg-type]
            parent=parent,
        )
