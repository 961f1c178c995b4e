"""Journal of packs that interrupted uploads of this host have left in a store, so that the next upload reuses them.

::

    DIR/uploads/STORE/PACK      storage blocks of a pack: content address and offset of each, as MessagePack

STORE is the digest of the URL of the store. A file appears when its pack is uploaded, and is removed when an image that
needs the pack is published. The journal is only an optimisation: an upload uses the entry of a pack only if the store
still lists the pack with its length, and no garbage collection has marked it. The content addresses of an encrypted
upload are keyed, so that the journal does not reveal its contents. Another key domain cannot use them.
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
from pageferry.stores.layout import PackEntry
from pageferry.stores.library import digest

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
    domain: bytes = b""
    """Identifier of the key domain; empty if the pack is not encrypted."""


class Journal:
    """Journal of the uploads to one store, in a private directory. Errors of the file system are logged only."""

    def __init__(self, folder: Path, store: StoreUrl) -> None:
        self._folder = folder / "uploads" / digest(str(store).encode()).hex()[:32]

    def add(self, pack: PackEntry, blocks: list[tuple[bytes, int]], domain: bytes = b"") -> None:
        """Record an uploaded pack. `domain`: identifier of its key domain."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.replace_file(self._folder / pack.digest.hex(), msgspec.msgpack.encode(_Entry(pack, blocks, domain)))
        except OSError as error:
            log.info("%s: an interrupted upload will not reuse a pack: %s", self._folder, error.strerror)

    def remove(self, packs: list[PackEntry]) -> None:
        """Remove packs that a published image needs."""
        for pack in packs:
            with contextlib.suppress(OSError):
                (self._folder / pack.digest.hex()).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other packs are left
            self._folder.rmdir()

    def entries(self, domain: bytes = b"") -> Iterator[tuple[PackEntry, list[tuple[bytes, int]]]]:
        """Yield the packs of a key domain and their blocks. Remove entries that are old, damaged or too many."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            found = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for number, path in enumerate(found):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                if number < MAX_PACKS and time.time() - path.stat().st_mtime < MAX_AGE:
                    entry = msgspec.msgpack.decode(files.read_regular(path, MAX_ENTRY, follow=False), type=_Entry)
                    if entry.domain == domain:
                        yield entry.pack, entry.blocks
                    continue
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
