"""Images whose storage blocks are fetched from a store when they are read (S10).

An image in the cache may lack storage blocks. `open_image_file` opens any image, and connects one of the cache to a
provider that fetches what it lacks, so that every reader gets complete contents. The files are passed to the provider
open: they stay usable after their entry is removed from the cache.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from pageferry.errors import ImageError
from pageferry.host import files
from pageferry.host.blocking import in_thread
from pageferry.host.python import start_python
from pageferry.images.image import ImageFile, Link
from pageferry.stores import entry
from pageferry.stores.address import image_url
from pageferry.stores.entry import Entry

if TYPE_CHECKING:
    from pageferry.stores.provider import SuppliedFile

FETCHED = 2048
"""Number of pages that `fetch` reads at once."""
FETCHES = 16
"""Maximum number of such reads at a time. Memory: 8 MiB each."""
_END = 2.0
"""Maximum time to wait for the threads of providers when this process exits, seconds."""

_threads: dict[threading.Thread, socket.socket] = {}
_started = threading.Event()
"""Set when a provider was started in this process."""


def open_image_file(path: str | Path, *, in_own_process: bool = False, whole: bool = False) -> ImageFile:
    """Open an image with its parents, as `ImageFile` does. Storage blocks that a file of the cache lacks are fetched
    from the store when they are needed.

    `in_own_process`: fetch them by another process. This is necessary if this process accesses memory that is loaded
    from the image: a thread that holds the GIL could wait for a page that only a provider in the same process could
    fetch. `whole`: provide also blocks that no page of the memory needs, such as those of parents that the image
    replaces. Raises ImageError.
    """
    image = ImageFile(path)
    for first, link in enumerate(image.links):
        if (found := _incomplete(image, first, link, whole)) is not None:
            try:
                _supply(image, first, *found, in_own_process)
            except OSError as error:
                raise ImageError(f"cannot fetch the contents of {path} from {found[1].url}: {error}") from error
            break
    return image


async def fetch(image: ImageFile) -> None:
    """Fetch all storage blocks that the memory of an image needs, so that its readers do not wait for the store. After
    an error or a cancellation, no more blocks are fetched, and reads of missing ones fail.

    Raises ImageError.
    """
    if image.is_fetched:
        from pageferry.stores.store import gathered  # most images are not in stores

        starts = range(0, image.pages, FETCHED)
        reads = (in_thread(image.check_pages, first, min(FETCHED, image.pages - first)) for first in starts)
        try:
            await gathered(reads, FETCHES)
        except BaseException:
            _shut_down(image.connection)  # the other reads would block threads for as long as the store is unavailable
            raise


def _shut_down(connection: socket.socket | None) -> None:
    """End a provider and the reads that wait for it."""
    if connection is not None:
        with contextlib.suppress(OSError):  # the provider has ended
            connection.shutdown(socket.SHUT_RDWR)


def _incomplete(image: ImageFile, first: int, link: Link, whole: bool) -> tuple[Path, Entry] | None:
    """Return the entry of the cache to which image `first` of the chain and its ancestors belong; None if there is
    none, or if it is complete and `whole` is false."""
    if (found := entry.entry_of(Path(os.path.realpath(link.path)))) is None:
        return None
    folder, record, skipped = found
    links, files = image.links[first:], record.files[skipped:]
    if [one.identity for one in links] != [file.identity for file in files] or (
        not whole and entry.is_complete(folder, record)
    ):
        return None
    return folder, msgspec.structs.replace(record, files=files)


def _supply(image: ImageFile, first: int, folder: Path, record: Entry, in_own_process: bool) -> None:
    """Connect image `first` of a chain and its ancestors to a provider. Raises OSError."""
    from pageferry.stores.provider import SuppliedFile  # imports asyncio clients, which most readers do not need

    opened: list[SuppliedFile] = []
    ours, theirs = socket.socketpair()
    try:
        for link, file in zip(image.links[first:], record.files, strict=True):
            table = files.open_regular(folder / entry.TABLES / file.manifest, follow=False)
            try:
                # The path may lead to another file by now.
                descriptor = files.open_regular(f"/proc/self/fd/{link.image.fileno()}", os.O_RDWR)
            except OSError:
                os.close(table)
                raise
            opened.append(SuppliedFile(descriptor, table))
        # A chain with other images, or with fewer, needs other blocks than the image of the entry.
        whole = folder if first == 0 and entry.load(folder) == record else None
        (_start_process if in_own_process else _start_thread)(record.url, opened, first, whole, theirs)
        opened = []
        image.chain.supply_from(ours.fileno(), first)
        image.connection = ours
        weakref.finalize(image, ours.close)
    except BaseException:
        ours.close()
        raise
    finally:
        for one in opened:
            one.close()


def _start_thread(
    url: str, opened: list[SuppliedFile], first: int, folder: Path | None, connection: socket.socket
) -> None:
    from pageferry.stores.provider import Provider

    provider = Provider(image_url("url", url), opened, first, folder)

    def run() -> None:
        try:
            asyncio.run(provider.run(connection))
        finally:
            _threads.pop(threading.current_thread(), None)

    thread = threading.Thread(target=run, name="pageferry-provider", daemon=True)
    _threads[thread] = connection
    _started.set()
    thread.start()


def _start_process(
    url: str, opened: list[SuppliedFile], first: int, folder: Path | None, connection: socket.socket
) -> None:
    described = [[file.descriptor, file.table] for file in opened]
    descriptors = [number for file in opened for number in (file.descriptor, file.table)]
    with connection:
        start_python(
            "pageferry.stores.provider_process",
            json.dumps([url, described, first, str(folder) if folder is not None else None]),
            stdin=connection.fileno(),
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
        )
    for file in opened:
        file.close()


def _end_threads() -> None:
    """End the providers before the interpreter exits: their client must not call it afterwards."""
    for thread, connection in list(_threads.items()):
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the provider has closed it
            continue
        thread.join(_END)


atexit.register(_end_threads)


def exit_process(code: int) -> NoReturn:
    """Exit as `sys.exit` does; if a provider was started in this process, exit without finalising the interpreter: a
    thread of its client that then takes the GIL would abort the process."""
    if not _started.is_set():
        sys.exit(code)
    _end_threads()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
