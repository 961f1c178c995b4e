"""Journal of packs that interrupted uploads of this host have left in a store, so that the next upload reuses them.

::

    DIR/uploads/STORE/PACK      storage blocks of a pack: content address and offset of each, as MessagePack

STORE is the digest of the URL of the store. A file appears when its pack is uploaded, and is removed when an image that
needs the pack is published. The journal is only an optimisation: an upload uses the entry of a pack only if the store
still lists the pack with its length, and no garbage collection has marked it. The content addresses of an encrypted
upload are keyed, so that the journal does not reveal its contents. Its entries are used in the same key domain only. An
entry contains the key of the domain as a manifest does, wrapped for the user, so that the next upload can continue a
domain of which no image has been published.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path

import msgspec

from pageferry.host import files
from pageferry.stores.address import StoreUrl
from pageferry.stores.keys import Keys
from pageferry.stores.layout import PackEntry, WrappedKey
from pageferry.stores.library import digest
from pageferry.stores.sealing import Domain

log = getLogger(__name__)

MAX_PACKS = 4096
"""Maximum number of packs of a store in the journal: 128 GiB."""
MAX_AGE = 7 * 86400.0
"""Age after which an entry is removed, seconds."""
MAX_ENTRY = 64 << 20


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    pack: PackEntry
    blocks: list[tuple[bytes, int]]
    """Content address and offset of each storage block."""
    key: WrappedKey | None = None
    """Wrapped key of the domain; None if the pack is not encrypted."""


class Journal:
    """Journal of the uploads to one store, in a private directory. Errors of the file system are logged only."""

    def __init__(self, folder: Path, store: StoreUrl) -> None:
        self.key: WrappedKey | None = None
        """Wrapped key of the domain of the current upload; None if it is not encrypted."""
        self._folder = folder / "uploads" / digest(str(store).encode()).hex()[:32]

    def add(self, pack: PackEntry, blocks: list[tuple[bytes, int]]) -> None:
        """Record an uploaded pack."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.replace_file(self._folder / pack.digest.hex(), msgspec.msgpack.encode(_Entry(pack, blocks, self.key)))
        except OSError as error:
            log.info("%s: an interrupted upload will not reuse a pack: %s", self._folder, error.strerror)

    def remove(self, needed: set[str]) -> None:
        """Remove the packs that a published image needs. `needed`: keys of all objects that it needs."""
        for key in needed:
            with contextlib.suppress(OSError):
                (self._folder / key.rpartition("/")[2]).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other packs are left
            self._folder.rmdir()

    def domain(self, keys: Keys) -> Domain | None:
        """Return the domain of the latest entry that uploads with these keys can continue; None if there is none."""
        tried: set[bytes] = set()
        for entry in self._entries():
            if entry.key is not None and entry.key.domain not in tried:
                tried.add(entry.key.domain)
                if (found := keys.continued(entry.key)) is not None:
                    return found
        return None

    def packs(self) -> Iterator[tuple[PackEntry, list[tuple[bytes, int]]]]:
        """Yield the packs of the key domain of the current upload, and their blocks."""
        expected = self.key.domain if self.key is not None else None
        for entry in self._entries():
            if (entry.key.domain if entry.key is not None else None) == expected:
                yield entry.pack, entry.blocks

    def _entries(self) -> Iterator[_Entry]:
        """Yield the entries, latest first. Remove those that are old, damaged or too many."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            found = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for number, path in enumerate(found):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                if number < MAX_PACKS and time.time() - path.stat().st_mtime < MAX_AGE:
                    entry = msgspec.msgpack.decode(files.read_regular(path, MAX_ENTRY, follow=False), type=_Entry)
                    yield entry
                    continue
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
