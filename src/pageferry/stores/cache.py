"""Cache of images of stores on this host: restores from a URL use the files in it.

::

    DIR/images/MANIFEST/files/     files of one image and its parents; beside them, entry.json
    DIR/images/.MANIFEST.partial   download in progress, or left by a killed process
    DIR/locks/MANIFEST             locked exclusively by downloads and removals, shared while the image is opened;
                                   removed with the entry

An entry has the digest of its manifest as its name, so it never becomes outdated. It appears by a rename when all of
its files are complete and synced. Equal parents of several entries are hard links of one file. The entries that were
used least recently are removed when the cache is larger than its limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pageferry.errors import ImageError, StoreError
from pageferry.events import Listener
from pageferry.host import files
from pageferry.host.blocking import in_thread, on_thread
from pageferry.images.image import ImageFile, open_link
from pageferry.images.metadata import ImageIdentity
from pageferry.stores.address import ImageUrl
from pageferry.stores.events import CacheCleared, CachedImage, CacheListing
from pageferry.stores.pull import Pull
from pageferry.stores.references import Manifest, open_image, read_reference
from pageferry.stores.store import ObjectMissing, Store

MAX_RECORD = 1 << 20
POLL = 0.1
"""Interval at which a lock of another process is polled, seconds."""
_RECORD, _FILES = "entry.json", "files"


class CachedFile(msgspec.Struct, frozen=True):
    """Image file of an entry."""

    name: str
    identity: ImageIdentity


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of `entry.json`."""

    url: str
    """URL from which the image was downloaded."""
    files: list[CachedFile]
    """Image, then its parents."""


@dataclass(slots=True)
class OpenEntry:
    """Entry that is not removed until `close`."""

    path: Path
    """Path of the image."""
    lock: int
    """Descriptor of the lock."""

    def close(self) -> None:
        """Permit that the entry is removed."""
        os.close(self.lock)


@dataclass(slots=True)
class ImageCache:
    """Cache in a directory that belongs to this user. `in_use` returns the paths of images that restores in progress
    may open again; their entries are not removed."""

    folder: Path
    limit: int
    """Size above which entries are removed, bytes."""
    in_use: Callable[[], Collection[str]] = field(default=lambda: ())

    def open(self) -> None:
        """Create the directories. Raises UsageError if other users can write to the directory, StoreError."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.check_private(self.folder, "set PAGEFERRY_CACHE_DIR to a directory that belongs to you")
            for name in ("images", "locks"):
                (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot create the cache {self.folder}: {error.strerror}") from error

    async def obtain(self, url: ImageUrl, listener: Listener) -> OpenEntry:
        """Return the entry of an image; download the image if there is no entry. Several processes that need the same
        image download it once. Raises ImageError, StoreError, UsageError."""
        self.open()
        store = Store(url.store)
        try:
            manifest = (await read_reference(store, url.name)).manifest
        except ObjectMissing:
            await open_image(store, url)  # raises an error that names the remedy
            raise
        lock = self._open_lock(manifest)
        try:
            while (path := await self._find_locked(lock, manifest)) is None:
                if _is_removed(lock):
                    os.close(lock)
                    lock = self._open_lock(manifest)
                elif not _try_lock(lock, fcntl.LOCK_EX):
                    await asyncio.sleep(POLL * (1 + random.random()))  # another process downloads it, or fails to open
                elif await in_thread(self._find, manifest) is None:
                    await self._fill(store, url, manifest, listener)
                    await on_thread(lambda: self._evict(manifest))
                fcntl.flock(lock, fcntl.LOCK_UN)
        except BaseException:
            os.close(lock)
            raise
        return OpenEntry(path, lock)

    def listing(self) -> CacheListing:
        """Describe all entries, least recently used first."""
        images = []
        for path in self._entries():
            entry = self._load(path)
            if entry is not None:
                images.append(CachedImage(url=entry.url, path=str(self._image(path, entry)), length=_size([path])))
        return CacheListing(folder=str(self.folder), limit=self.limit, length=_size(self._entries()), images=images)

    def clear(self) -> CacheCleared:
        """Remove all entries that are not in use, and what killed processes have left."""
        return self._remove(self._entries(), 0)

    # -- entries

    def _image(self, path: Path, entry: Entry) -> Path:
        return path / _FILES / entry.files[0].name

    def _entries(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            found = [path for path in (self.folder / "images").iterdir() if not path.name.startswith(".")]
            return sorted(found, key=lambda path: path.stat().st_mtime)
        return []

    def _load(self, path: Path) -> Entry | None:
        try:
            entry = msgspec.json.decode(files.read_regular(path / _RECORD, MAX_RECORD, follow=False), type=Entry)
        except (OSError, msgspec.MsgspecError):
            return None
        return entry if entry.files else None

    def _find(self, manifest: str) -> Path | None:
        """Return the path of the image of an entry; None if there is no entry, or if its image cannot be opened."""
        path = self.folder / "images" / manifest
        if (entry := self._load(path)) is not None:
            image = path / _FILES / entry.files[0].name
            with contextlib.suppress(ImageError, FileNotFoundError):
                if ImageFile(image).identity == entry.files[0].identity:
                    os.utime(path)
                    return image
        return None

    async def _find_locked(self, lock: int, manifest: str) -> Path | None:
        """Return the path of the image of the entry, with a shared lock; None if there is no entry, or if another
        process has locked it."""
        return await in_thread(self._find, manifest) if _try_lock(lock, fcntl.LOCK_SH) else None

    async def _fill(self, store: Store, url: ImageUrl, manifest: str, listener: Listener) -> None:
        """Download an image into a new entry."""
        _, manifests = await open_image(store, url)
        if manifests[0].digest != manifest:
            raise ImageError(f"cannot download {url}: it was replaced at the same time; try again")
        partial = self.folder / "images" / f".{manifest}.partial"
        names = [_file_name(url.name, manifests[0]), *(one.name for one in manifests[0].directory.ancestors)]
        entry = Entry(
            url=str(url),
            files=[CachedFile(name, one.directory.identity) for name, one in zip(names, manifests, strict=True)],
        )
        await on_thread(lambda: self._begin(partial, entry))
        await Pull(store, url, partial / _FILES / names[0], listener).run()
        await on_thread(lambda: self._complete(partial, entry, manifest))

    def _begin(self, partial: Path, entry: Entry) -> None:
        """Create the directory of a new entry, with links to the parents that other entries have."""
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / _FILES).mkdir(mode=0o700, parents=True)
            existing = {
                file.identity: path / _FILES / file.name
                for path in self._entries()
                if (other := self._load(path)) is not None
                for file in other.files
            }
            for file in entry.files[1:]:
                if (source := existing.get(file.identity)) is not None:
                    with contextlib.suppress(FileNotFoundError, ImageError):  # removed since, or damaged
                        if open_link(source).identity == file.identity:
                            os.link(source, partial / _FILES / file.name)
        except OSError as error:
            raise StoreError(f"cannot write to the cache {self.folder}: {error.strerror}") from error

    def _complete(self, partial: Path, entry: Entry, manifest: str) -> None:
        try:
            files.replace_file(partial / _RECORD, msgspec.json.encode(entry), synced=True)
            shutil.rmtree(partial.parent / manifest, ignore_errors=True)  # an entry that could not be opened
            partial.rename(partial.parent / manifest)
        except OSError as error:
            raise StoreError(f"cannot write to the cache {self.folder}: {error.strerror}") from error

    # -- removal

    def _evict(self, kept: str) -> None:
        """Remove the entries that were used least recently, until the cache does not exceed its limit."""
        self._remove([path for path in self._entries() if path.name != kept], self.limit)

    def _remove(self, candidates: list[Path], limit: int) -> CacheCleared:
        used = {str(Path(path).parent.parent) for path in self.in_use()}
        before = _size(self._entries())
        removed: list[str] = []
        kept: list[str] = []
        for path in candidates:
            if limit and _size(self._entries()) <= limit:
                break
            (kept if str(path) in used or not self._remove_entry(path.name) else removed).append(str(path))
        for path in (self.folder / "locks").iterdir():
            if not (self.folder / "images" / path.name).exists():
                self._remove_entry(path.name, partial=True)
        return CacheCleared(folder=str(self.folder), removed=removed, kept=kept, freed=before - _size(self._entries()))

    def _remove_entry(self, manifest: str, *, partial: bool = False) -> bool:
        """Remove an entry, or the rest of a download, and its lock, unless a process has locked it."""
        lock = self._open_lock(manifest)
        try:
            if not _try_lock(lock, fcntl.LOCK_EX):
                return False
            if not partial:
                shutil.rmtree(self.folder / "images" / manifest, ignore_errors=True)
            shutil.rmtree(self.folder / "images" / f".{manifest}.partial", ignore_errors=True)
            if not (self.folder / "images" / manifest).exists():
                os.unlink(self.folder / "locks" / manifest)
            return True
        finally:
            os.close(lock)

    # -- locks

    def _open_lock(self, manifest: str) -> int:
        return files.open_private(self.folder / "locks" / manifest, os.O_RDWR)


def _try_lock(lock: int, kind: int) -> bool:
    """Try to acquire a lock, or to convert it, and return whether this succeeded. A failed conversion releases it. The
    lock of a file that was removed protects nothing, and cannot be acquired."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if _is_removed(lock):
        fcntl.flock(lock, fcntl.LOCK_UN)
        return False
    return True


def _is_removed(lock: int) -> bool:
    """Return whether the file of a lock has been removed with its entry. Another file may have its name."""
    return os.fstat(lock).st_nlink == 0


def _file_name(name: str, manifest: Manifest) -> str:
    """Return a file name for an image that none of its parents has."""
    taken = {one.name for one in manifest.directory.ancestors}
    return name if name not in taken else f"{name}-{manifest.digest[:8]}"


def _size(paths: list[Path]) -> int:
    """Return the space of the files of entries, bytes. A file with several links counts once."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed at the same time
            for file in os.scandir(path / _FILES):
                stat = file.stat(follow_symlinks=False)
                found[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())
