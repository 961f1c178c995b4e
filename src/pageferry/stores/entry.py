"""Entries of the cache of images: which files an entry has, and where their storage blocks are in a store.

::

    DIR/images/MANIFEST/files/          files of one image and its parents, and their working sets
    DIR/images/MANIFEST/tables/         block tables of these files (`tables`), by the digests of their manifests
    DIR/images/MANIFEST/entry.json      `Entry`
    DIR/images/MANIFEST/complete.json   `Complete`, once all blocks that the memory needs are in the files, and synced

A file has its full length from the start. Storage blocks that have not been fetched yet are holes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from pageferry.host import files
from pageferry.images.metadata import ImageIdentity

MAX_RECORD = 1 << 20
_DIGEST = re.compile("[0-9a-f]{64}")
RECORD, FILES, TABLES, COMPLETE = "entry.json", "files", "tables", "complete.json"


class CachedFile(msgspec.Struct, frozen=True, kw_only=True):
    """Image file of an entry."""

    name: str
    identity: ImageIdentity
    manifest: str
    """Digest of the manifest, hexadecimal. Unlike the identity, it determines all contents."""
    contents: int
    """Space of the file when all of its storage blocks are present, bytes."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of `entry.json`."""

    url: str
    """URL of the image."""
    files: list[CachedFile]
    """Image, then its parents."""
    encrypted: bool = False
    """Whether the image is encrypted in the store."""


class Complete(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of `complete.json`."""

    inodes: list[int]
    """Inode number of each file, in the order of `Entry.files`. An entry of the same name that was created later has
    other files."""


def load(folder: Path) -> Entry | None:
    """Return the entry in a directory; None if there is none, or if it cannot be read."""
    try:
        entry = msgspec.json.decode(files.read_regular(folder / RECORD, MAX_RECORD, follow=False), type=Entry)
    except (OSError, msgspec.MsgspecError):
        return None
    return entry if entry.files else None


def is_complete(folder: Path, entry: Entry) -> bool:
    """Return whether all blocks that the memory of the image needs are in the files, and synced."""
    try:
        found = msgspec.json.decode(files.read_regular(folder / COMPLETE, MAX_RECORD, follow=False), type=Complete)
        return found.inodes == [os.stat(folder / FILES / file.name).st_ino for file in entry.files]
    except (OSError, msgspec.MsgspecError):
        return False


def mark_complete(folder: Path, descriptors: list[int]) -> None:
    """Sync the files of an entry that have all blocks that the memory needs, and record this. Raises OSError."""
    inodes = []
    for descriptor in descriptors:
        os.fsync(descriptor)
        inodes.append(os.fstat(descriptor).st_ino)
    files.replace_file(folder / COMPLETE, msgspec.json.encode(Complete(inodes=inodes)), synced=True)


def version_of(image: Path) -> int | None:
    """Return a number that identifies the contents of a file of an entry, although blocks are written to it; None for
    any other file."""
    folder = image.parent.parent
    if image.parent.name != FILES or _DIGEST.fullmatch(folder.name) is None or not (folder / RECORD).exists():
        return None
    return int(folder.name[:15], 16)


def entry_of(image: Path) -> tuple[Path, Entry, int] | None:
    """Return the directory and the record of the entry to which an image file belongs, and the number of the file in
    it; None for any other file. An entry that other users could have written is ignored: it names a store to read
    from."""
    if image.parent.name != FILES:
        return None
    folder = image.parent.parent
    try:
        for part in (folder, image.parent):
            found = os.lstat(part)
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return None
    except OSError:
        return None
    entry = load(folder)
    names = [file.name for file in entry.files] if entry is not None else []
    return (folder, entry, names.index(image.name)) if entry is not None and image.name in names else None
