"""Working sets: a restore first loads the pages that were accessed first after earlier restores (S10).

The record is the file IMAGE.ws beside the image, since images are never modified. A restore without prefetch observes
every first access. The record is then the intersection of these pages and the previous record, so it keeps the pages
accessed every time. A restore with prefetch observes only accesses to pages that are not in the record. These pages are
stored separately, and pages observed in two consecutive restores are appended to the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from logging import getLogger
from pathlib import Path

import msgspec

from pageferry.host import files
from pageferry.images.image import ImageFile

log = getLogger(__name__)

VERSION = 1
MAX_WINDOWS = 1 << 20
"""Maximum number of windows in a record: 64 GiB."""
MAX_LENGTH = 16 << 20
"""Maximum length of a record, bytes."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of IMAGE.ws, as MessagePack."""

    version: int
    image: str
    """Id of the image. The record is ignored for any other image at the same path."""
    runs: int
    windows: list[int]
    """Windows of 16 pages, numbered over all regions, in the order of their first access."""
    candidates: list[int]
    """Windows accessed in the last restore that are not in `windows`."""


def path_of(image: Path) -> Path:
    """Return the path of the working set of an image."""
    return Path(f"{image}.ws")


class WorkingSet:
    """Working set of an image. A record that cannot be read counts as empty, because it is only an optimisation."""

    def __init__(self, image: ImageFile) -> None:
        self.path = path_of(image.path)
        self._id = image.image.id.hex()
        self._limit = -(-image.pages // 16)
        self._record = self._load()

    @property
    def windows(self) -> list[int]:
        """Windows to load first, in order."""
        return self._record.windows

    def learn(self, touched: Sequence[int], prefetched: bool) -> None:
        """Update the record with the windows that were accessed in a restore, in order. `prefetched`: whether prefetch
        was enabled in the restore. A failure to write the file is only logged."""
        candidates: list[int] = []
        seen = list(dict.fromkeys(touched))[:MAX_WINDOWS]
        old = self._record
        if not prefetched and old.runs:
            again = set(seen)
            windows = [window for window in old.windows if window in again]
        elif not prefetched or not old.runs:
            windows = seen
        else:
            again = set(old.candidates)
            known = set(old.windows)
            windows = old.windows + [window for window in seen if window in again and window not in known]
            candidates = seen
        self._record = msgspec.structs.replace(old, runs=old.runs + 1, windows=windows, candidates=candidates)
        self._store()

    def _load(self) -> Record:
        empty = Record(version=VERSION, image=self._id, runs=0, windows=[], candidates=[])
        try:
            found = msgspec.msgpack.decode(files.read_regular(self.path, MAX_LENGTH, follow=False), type=Record)
        except (OSError, msgspec.MsgspecError):
            return empty
        if (found.version, found.image) != (VERSION, self._id) or len(found.windows) > MAX_WINDOWS:
            return empty
        usable = [window for window in found.windows if 0 <= window < self._limit]
        return msgspec.structs.replace(found, windows=usable)

    def _store(self) -> None:
        try:
            files.replace_file(self.path, msgspec.msgpack.encode(self._record))
        except OSError as error:
            log.info(
                "cannot write the working set to %s: %s; the next restore loads pages in the order of their addresses",
                self.path,
                error.strerror,
            )
