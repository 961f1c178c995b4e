"""Object store: the few operations that images need, with bounds for every download, and errors of pageferry.

The client, obstore, retries requests after server errors (5xx) and lost connections. An object is uploaded with one
request, so no multipart upload is ever left unfinished.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pageferry.errors import ImageError, PageferryError, StoreError
from pageferry.host import files
from pageferry.host.blocking import in_thread, on_thread
from pageferry.stores.address import StoreUrl
from pageferry.stores.library import obstore

T = TypeVar("T")

REQUEST_TIMEOUT = timedelta(minutes=10)
"""Maximum duration of one request, such as the upload of a pack over a slow link."""
CONNECT_TIMEOUT = timedelta(seconds=10)
RETRY_TIMEOUT = timedelta(minutes=3)
"""Maximum time during which a failed request is repeated."""
MAX_RETRIES = 1000
"""Maximum number of repetitions. `RETRY_TIMEOUT` ends them earlier, because of the pauses between them."""
BACKOFF = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 4}
"""Pauses between repetitions: each is random, and on average about twice as long as the previous one."""
REQUESTS = 16
"""Maximum number of small requests at a time."""
KINDS = ("images", "manifests", "packs", "condemned", "checks")
"""First parts of the keys of all objects."""
_INCOMPLETE = re.compile(r".+#[0-9]+")
"""Name of a file that an upload to a directory has not completed."""
_DENIED = re.compile(r"\b(403|Forbidden|AccessDenied)\b")
"""Text of errors of listings without permission, which the client does not distinguish from other errors."""
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""Environment variables with the URL of an S3 server, in the order of their precedence."""


class ObjectMissing(ImageError):
    """The object does not exist in the store."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Entry of a listing."""

    key: str
    length: int
    modified: datetime


class Budget:
    """Memory that objects of untrusted lengths may occupy together, bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit

    def take(self, length: int, where: str) -> None:
        """Reserve memory for an object. Raises ImageError if the objects are too large."""
        self._left -= length
        if self._left < 0:
            raise ImageError(f"cannot read {where}: it and its ancestors have more than {self._limit} bytes")


class Store:
    """Open store. Keys are relative to the URL of the store. Raises UnsupportedError without the extra `stores`,
    UsageError for an invalid URL, StoreError if the configuration in the environment is invalid.

    `retry_timeout`: maximum time during which a failed request is repeated; zero for no repetition. `read_timeout`:
    time without a byte from the store after which a request has failed; by default, only its duration is limited.
    """

    def __init__(
        self,
        url: StoreUrl,
        *,
        create: bool = False,
        retry_timeout: timedelta = RETRY_TIMEOUT,
        read_timeout: timedelta = REQUEST_TIMEOUT,
    ) -> None:
        self.url = url
        self._retry_timeout = retry_timeout
        self._read_timeout = read_timeout
        self._obstore = obstore()
        self._written: list[str] = []
        with self._translated("open the store"):
            self._client = self._open(create)

    # -- reading

    async def get(self, key: str, limit: int, budget: Budget | None = None) -> bytes:
        """Return the contents of an object. Raises ObjectMissing, ImageError if it is larger than `limit` bytes or than
        the rest of the budget, StoreError."""
        found = await self._call(lambda: self._obstore.get_async(self._client, key), f"read {key}")
        length = found.meta["size"]
        if length > limit:
            raise ImageError(f"cannot read {self.url}/{key}: it has {length} bytes, expected at most {limit}")
        if budget is not None:
            budget.take(length, f"{self.url}/{key}")
        return bytes(await self._call(found.bytes_async, f"read {key}"))

    async def get_range(self, key: str, start: int, length: int) -> memoryview:
        """Return a range of an object. Raises ObjectMissing, ImageError if the object is shorter, StoreError, also if
        the directory of objects of this kind is missing: the file system of the store may not be mounted."""
        get_range = self._obstore.get_range_async
        try:
            reading = self._call(lambda: get_range(self._client, key, start=start, length=length), f"read {key}")
            data = memoryview(await reading)
        except ObjectMissing as error:
            if (folder := self.url.folder) is not None and not await on_thread((folder / key).parent.is_dir):
                raise StoreError(
                    f"cannot read {key} in {self.url}: {folder} has no directory {Path(key).parent}; mount the file "
                    "system of the store"
                ) from error
            raise
        except StoreError:
            found = await self.find(key)
            if found is None or found.length >= start + length:
                raise
            raise ImageError(
                f"cannot read {self.url}/{key}: it has {found.length} bytes, expected at least {start + length}"
            ) from None
        if len(data) != length:
            raise ImageError(f"cannot read {self.url}/{key}: a range of {length} bytes has {len(data)} bytes")
        return data

    async def find(self, key: str) -> StoredObject | None:
        """Return the entry of an object, or None if it does not exist. Raises StoreError."""
        try:
            return _entry(await self._call(lambda: self._obstore.head_async(self._client, key), f"read {key}"))
        except ObjectMissing:
            return None

    async def list(self, prefix: str) -> list[StoredObject]:
        """Return the objects whose keys begin with `prefix/`, sorted by key. Raises StoreError."""
        listing = self._obstore.list
        found = await self._call(lambda: listing(self._client, prefix).collect_async(), f"list {prefix}")
        return sorted((_entry(one) for one in found), key=lambda entry: entry.key)

    # -- writing

    async def put(self, key: str, data: bytes | bytearray) -> None:
        """Upload an object, which replaces an object with the same key. Raises StoreError."""
        await self._upload(key, data, "overwrite")

    async def create(self, key: str, data: bytes) -> bool:
        """Upload an object if there is none with this key. Return False if there is one, which is then unchanged.

        After a server error, the client repeats the request, and may then find its own object: the caller compares the
        contents. After a lost connection, it raises StoreError, although the object may have been created.
        """
        try:
            await self._upload(key, data, "create")
        except self._obstore.exceptions.AlreadyExistsError:
            return False
        return True

    async def probe(self) -> None:
        """Create an object in the prefix `checks`, and delete it, to find missing permissions. Raises StoreError."""
        key = f"checks/{os.urandom(16).hex()}"
        await self.create(key, b"")
        await self.delete(key)

    async def delete(self, key: str) -> None:
        """Delete an object, if it exists. Raises StoreError."""
        if key in self._written:
            self._written.remove(key)
        with contextlib.suppress(ObjectMissing):
            await self._call(lambda: self._obstore.delete_async(self._client, key), f"delete {key}")

    async def sync(self, others: Iterable[str] = ()) -> None:
        """Make the objects durable that were uploaded to a directory, and `others`: an upload that was killed may have
        written these without syncing them. Stores behind a network do so for each upload.

        Raises StoreError.
        """
        folder, written = self.url.folder, [*self._written, *others]
        if folder is not None and written:
            self._written = []
            await in_thread(_sync, str(folder), written)

    async def remove_incomplete(self, before: datetime) -> None:
        """Remove the files that killed uploads to a directory left before a time. Other stores have no such objects.

        Raises StoreError.
        """
        if (folder := self.url.folder) is not None:
            await in_thread(_remove_incomplete, folder, before)

    async def _upload(self, key: str, data: bytes | bytearray, mode: str) -> None:
        put = self._obstore.put_async
        try:
            await self._call(lambda: put(self._client, key, data, mode=mode, use_multipart=False), f"write {key}")
        except ObjectMissing as error:
            raise StoreError(f"cannot write {key} in {self.url}: there is no such bucket; check the URL") from error
        self._written.append(key)

    # -- connection and errors

    def _open(self, create: bool) -> Any:
        store, url = self._obstore.store, self.url
        if url.folder is not None:
            if not create and not url.folder.is_dir():
                raise StoreError(f"cannot open the store {url}: {url.folder} is not a directory")
            return store.LocalStore(url.folder, mkdir=create)
        options: dict[str, Any] = {
            "client_options": {
                "timeout": REQUEST_TIMEOUT,
                "read_timeout": self._read_timeout,
                "connect_timeout": CONNECT_TIMEOUT,
            },
            "retry_config": {
                "max_retries": MAX_RETRIES if self._retry_timeout else 0,
                "retry_timeout": self._retry_timeout,
                "backoff": BACKOFF,
            },
        }
        if url.scheme == "http":
            options["client_options"]["allow_http"] = True
        if url.scheme in ("http", "https"):
            return store.HTTPStore.from_url(str(url), **options)
        if url.scheme == "s3" and (endpoint := _endpoint()) is not None:
            options["endpoint"] = endpoint
            options["client_options"]["allow_http"] = urlsplit(endpoint).scheme == "http"
        return store.from_url(str(url), **options)

    async def _call(self, call: Callable[[], Awaitable[T]], operation: str) -> T:
        with self._translated(operation):
            return await call()

    @contextlib.contextmanager
    def _translated(self, operation: str) -> Iterator[None]:
        """Translate errors of the client, except AlreadyExistsError, which is a result."""
        errors = self._obstore.exceptions
        try:
            yield
        except (PageferryError, errors.AlreadyExistsError):
            raise
        except FileNotFoundError as error:
            raise ObjectMissing(f"cannot {operation} in {self.url}: there is no such object") from error
        except (errors.BaseError, OSError, ValueError, NotImplementedError) as error:
            denied = isinstance(error, (errors.PermissionDeniedError, errors.UnauthenticatedError))
            if denied or _DENIED.search(str(error)):
                raise StoreError(
                    f"cannot {operation} in {self.url}: permission denied: {_cause(error)}; check the credentials in "
                    "the environment (docs/stores.md)"
                ) from error
            raise StoreError(f"cannot {operation} in {self.url}: {_cause(error)}") from error


def _endpoint() -> str | None:
    return next((value for name in _ENDPOINTS if (value := os.environ.get(name))), None)


def _entry(meta: Any) -> StoredObject:
    return StoredObject(meta["path"], meta["size"], meta["last_modified"])


def _cause(error: BaseException) -> str:
    """Return the message of an error of the client in one line, without its debugging output."""
    lines = [line.strip() for line in str(error).split("\n\nDebug source:")[0].splitlines()]
    return " ".join(line for line in lines if line)[:500] or type(error).__name__


def _remove_incomplete(folder: Path, before: datetime) -> None:
    """Remove temporary files, whose names are those of objects with a number, but no other files of the directory.

    Raises StoreError.
    """
    found = (path for kind in KINDS for path in (folder / kind).rglob("*") if _INCOMPLETE.fullmatch(path.name))
    for path in found:
        try:
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime < before.timestamp():
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # its upload has ended
            continue
        except OSError as error:
            raise StoreError(f"cannot remove {path}: {error.strerror}") from error


def _sync(folder: str, keys: list[str]) -> None:
    """Sync files and their directories. Raises StoreError."""
    paths = {os.path.join(folder, key) for key in keys}
    folders = {folder}
    for path in paths:
        while (path := os.path.dirname(path)) not in folders:
            folders.add(path)
    try:
        for path in (*paths, *folders):
            folder_flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            descriptor = os.open(path, folder_flags) if path in folders else files.open_regular(path)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise StoreError(f"cannot write to the store in {folder}: {error.strerror}") from error


async def gathered(calls: Iterable[Coroutine[object, object, T]], limit: int = REQUESTS) -> list[T]:
    """Run coroutines, at most `limit` at a time, and return their results in order. After an error, cancel the others,
    and raise the error."""
    slots = asyncio.Semaphore(limit)

    async def one(call: Coroutine[object, object, T]) -> T:
        async with slots:
            return await call

    pending = list(calls)
    tasks = [asyncio.ensure_future(one(call)) for call in pending]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for call in pending:
            call.close()  # those that have not begun
        raise
