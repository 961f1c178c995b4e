"""Cache of images of stores on this host: restores from a URL use the files in it.

::

    DIR/images/MANIFEST            entry: one image with its parents (`pageferry.stores.entry`)
    DIR/images/.MANIFEST.partial   entry that is being created, or was left by a killed process
    DIR/locks/MANIFEST             locked exclusively by creations and removals, shared while the image is opened;
                                   removed with the entry

An entry has the digest of its manifest as its name, so it never becomes outdated. It appears by a rename when its files
have everything but their storage blocks, which are fetched when they are needed (`pageferry.stores.provider`). Equal
parents of several entries are hard links of one file. The entries that were used least recently are removed when the
cache is larger than its limit.

The files are not encrypted. An encrypted image in the cache is only used if the keys open its manifest in the store.
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

from pageferry.errors import ImageError, StoreError, WrongKey
from pageferry.host import files
from pageferry.host.blocking import in_thread, on_thread
from pageferry.host.fault_points import fault_point
from pageferry.images.image import ImageFile, damaged_sections, open_link
from pageferry.stores import entry, tables
from pageferry.stores.address import ImageUrl
from pageferry.stores.entry import CachedFile, Entry
from pageferry.stores.events import CacheCleared, CachedImage, CacheListing
from pageferry.stores.keys import NO_KEYS, Access
from pageferry.stores.layout import Reference
from pageferry.stores.manifests import Manifest
from pageferry.stores.pull import check_file, write_frame
from pageferry.stores.references import open_manifests, prove_access
from pageferry.stores.store import Store

POLL = 0.1
"""Interval at which a lock of another process is polled, seconds."""


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

    async def obtain(self, url: ImageUrl, access: Access = NO_KEYS) -> OpenEntry:
        """Return the entry of an image; create it if there is none. Several processes that need the same image
        create it once. The keys must open the image in the store, also if there is an entry.

        Raises ImageError, StoreError, UsageError, WrongKey.
        """
        self.open()
        store = Store(url.store)
        reference, encrypted = await prove_access(store, url, access)
        manifest = reference.manifest
        lock = self._open_lock(manifest)
        try:
            while (path := await self._find_locked(lock, manifest)) is None:
                if _is_removed(lock):
                    os.close(lock)
                    lock = self._open_lock(manifest)
                elif not _try_lock(lock, fcntl.LOCK_EX):
                    await asyncio.sleep(POLL * (1 + random.random()))  # another process creates it, or fails to open
                elif await in_thread(self._find, manifest) is None:
                    await self._create(store, url, reference, access)
                    await in_thread(self._check_new, url, manifest)
                    await on_thread(lambda: self._evict(manifest))
                fcntl.flock(lock, fcntl.LOCK_UN)
            await in_thread(_check_encrypted, path, encrypted)
        except BaseException:
            os.close(lock)
            raise
        return OpenEntry(path, lock)

    def listing(self) -> CacheListing:
        """Describe all entries, least recently used first."""
        images = []
        for path in self._entries():
            if (found := entry.load(path)) is not None:
                length, contents = _size([path]), sum(file.contents for file in found.files)
                images.append(
                    CachedImage(
                        url=found.url,
                        path=str(path / entry.FILES / found.files[0].name),
                        length=length,
                        contents=max(contents, length) if entry.is_complete(path, found) else contents,
                        complete=entry.is_complete(path, found),
                    )
                )
        return CacheListing(folder=str(self.folder), limit=self.limit, length=_size(self._entries()), images=images)

    def clear(self) -> CacheCleared:
        """Remove all entries that are not in use, and what killed processes have left."""
        return self._remove(self._entries(), 0)

    # -- entries

    def _entries(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            found = [path for path in (self.folder / "images").iterdir() if not path.name.startswith(".")]
            return sorted(found, key=lambda path: path.stat().st_mtime)
        return []

    def _find(self, manifest: str) -> Path | None:
        """Return the path of the image of an entry; None if there is no entry, or if its image cannot be opened."""
        with contextlib.suppress(ImageError, FileNotFoundError):
            return self._open(manifest)
        return None

    def _open(self, manifest: str) -> Path:
        """Return the path of the image of an entry. Raises ImageError if there is no entry, or if its image cannot be
        opened, FileNotFoundError if the entry has just been removed."""
        path = self.folder / "images" / manifest
        if (found := entry.load(path)) is None:
            raise ImageError(f"cannot read the entry {path} of the cache")
        image = path / entry.FILES / found.files[0].name
        links = ImageFile(image).links
        if links[0].identity != found.files[0].identity:
            raise ImageError(f"{image} has been replaced")
        # The sections are not synced before the entry is complete: they may be damaged after a crash.
        if damage := [finding for link in links for finding in damaged_sections(link)]:
            raise ImageError(damage[0])
        os.utime(path)
        return image

    def _check_new(self, url: ImageUrl, manifest: str) -> None:
        """Raise ImageError if the image of an entry that has just been created cannot be opened: the entry would be
        created again for ever."""
        try:
            self._open(manifest)
        except (ImageError, FileNotFoundError) as error:
            raise ImageError(
                f"cannot read {url}: its files in the cache cannot be opened: {error}; upload the image again under "
                "another name, with `--reupload`"
            ) from error

    async def _find_locked(self, lock: int, manifest: str) -> Path | None:
        """Return the path of the image of the entry, with a shared lock; None if there is no entry, or if another
        process has locked it."""
        return await in_thread(self._find, manifest) if _try_lock(lock, fcntl.LOCK_SH) else None

    async def _create(self, store: Store, url: ImageUrl, reference: Reference, access: Access) -> None:
        """Create the entry of an image, without storage blocks."""
        manifests = await open_manifests(store, url, reference, access)
        names = [_file_name(url.name, manifests[0]), *(one.name for one in manifests[0].directory.ancestors)]
        if len(set(names)) < len(names) or any(name in (".", "..") for name in names):
            raise ImageError(f"cannot read {url}: the names of its parents are invalid: {', '.join(names[1:])}")
        await on_thread(lambda: self._write(str(url), reference.manifest, dict(zip(names, manifests, strict=True))))
        fault_point("store.cached")

    def _write(self, url: str, manifest: str, manifests: dict[str, Manifest]) -> None:
        """Write a new entry. `manifests`: by name of the file, image first. Raises ImageError, StoreError."""
        partial = self.folder / "images" / f".{manifest}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            for name in (entry.FILES, entry.TABLES):
                (partial / name).mkdir(mode=0o700, parents=True)
            self._link_parents(partial, manifests)
            for name, one in manifests.items():
                files.replace_file(partial / entry.TABLES / one.digest, tables.encode(one))
                if not (partial / entry.FILES / name).exists():
                    _write_frame(partial / entry.FILES / name, one)
            found = [
                CachedFile(
                    name=name, identity=one.directory.identity, manifest=one.digest, contents=_contents_length(one)
                )
                for name, one in manifests.items()
            ]
            encrypted = any(one.sealing.domain for one in manifests.values())
            files.replace_file(
                partial / entry.RECORD, msgspec.json.encode(Entry(url=url, files=found, encrypted=encrypted))
            )
            fault_point("store.written")
            shutil.rmtree(partial.parent / manifest, ignore_errors=True)  # an entry that could not be opened
            partial.rename(partial.parent / manifest)
        except OSError as error:
            raise StoreError(f"cannot write to the cache {self.folder}: {error.strerror}") from error

    def _link_parents(self, partial: Path, manifests: dict[str, Manifest]) -> None:
        """Create links to the parents that other entries have."""
        existing = {
            file.manifest: path / entry.FILES / file.name
            for path in self._entries()
            if (other := entry.load(path)) is not None
            for file in other.files
        }
        for name, one in list(manifests.items())[1:]:
            if (source := existing.get(one.digest)) is not None:
                with contextlib.suppress(FileNotFoundError, ImageError):  # removed since, or damaged
                    link = open_link(source)
                    if link.identity == one.directory.identity and not damaged_sections(link):
                        os.link(source, partial / entry.FILES / name)

    # -- removal

    def _evict(self, kept: str) -> None:
        """Remove the entries that were used least recently, until the cache does not exceed its limit when the entry
        `kept` is complete."""
        path = self.folder / "images" / kept
        found = entry.load(path)
        missing = sum(file.contents for file in found.files) - _size([path]) if found is not None else 0
        others = [path for path in self._entries() if path.name != kept]
        self._remove(others, max(self.limit - max(missing, 0), 1))

    def _remove(self, candidates: list[Path], limit: int) -> CacheCleared:
        before = _size(self._entries())
        removed: list[str] = []
        kept: list[str] = []
        for path in candidates:
            if limit and _size(self._entries()) <= limit:
                break
            (removed if self._remove_entry(path.name) else kept).append(str(path))
        for path in (self.folder / "locks").iterdir():
            if not (self.folder / "images" / path.name).exists():
                self._remove_entry(path.name, partial=True)
        return CacheCleared(folder=str(self.folder), removed=removed, kept=kept, freed=before - _size(self._entries()))

    def _remove_entry(self, manifest: str, *, partial: bool = False) -> bool:
        """Remove an entry, or the rest of a download, and its lock, unless a process has locked or uses it."""
        lock = self._open_lock(manifest)
        try:
            if not _try_lock(lock, fcntl.LOCK_EX):
                return False
            if not partial:
                path = self.folder / "images" / manifest
                # A restore records its image before it releases the lock: an earlier look could miss that.
                if any(Path(used).parent.parent == path for used in self.in_use()):
                    return False
                shutil.rmtree(path, ignore_errors=True)
            shutil.rmtree(self.folder / "images" / f".{manifest}.partial", ignore_errors=True)
            if not (self.folder / "images" / manifest).exists():
                os.unlink(self.folder / "locks" / manifest)
            return True
        finally:
            os.close(lock)

    # -- locks

    def _open_lock(self, manifest: str) -> int:
        return files.open_private(self.folder / "locks" / manifest, os.O_RDWR)


def _check_encrypted(image: Path, encrypted: bool) -> None:
    """Raise WrongKey if the image was encrypted when its entry was created, and its reference no longer shows that."""
    found = entry.load(image.parent.parent)
    if found is not None and found.encrypted and not encrypted:
        raise WrongKey(f"cannot read {found.url}: it is encrypted; give its key with `key` or `key_command`")


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


def _write_frame(path: Path, manifest: Manifest) -> None:
    """Create an image file without storage blocks, and check it. Raises ImageError, OSError."""
    descriptor = files.open_private(path, os.O_RDWR)
    try:
        write_frame(descriptor, manifest)
        check_file(descriptor, manifest)
    finally:
        os.close(descriptor)


def _contents_length(manifest: Manifest) -> int:
    """Return the space of the file of an image with all of its storage blocks, bytes."""
    frame = sum(chunk.length for chunk in manifest.directory.chunks)
    return frame + sum(record.length for record in manifest.records())


def _size(paths: list[Path]) -> int:
    """Return the space of the files of entries, bytes. A file with several links counts once."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed at the same time
            for file in os.scandir(path / entry.FILES):
                stat = file.stat(follow_symlinks=False)
                found[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())
