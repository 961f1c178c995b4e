"""Provider of storage blocks: fetches the blocks of cached images that the engine requests over a socket (S10).

The engine's threads wait for blocks without the GIL (`crates/engine/src/image/supply.rs`, which defines the messages).
Calls of `in_thread` may wait for a provider in the same process, which therefore does not use their threads.
The provider runs on an event loop of a thread of the pager process, or of a separate process. It verifies each block
by its BLAKE3 digest, writes it to the file of the cache, and reports it to the engine.

Demanded blocks are fetched first, one request per range of neighbours; a request that is slower than usual is sent
again, and the first reply is used. Blocks that no thread waits for are fetched in the order of background loading, with
many large requests at a time, and with few while demanded blocks are missing.

While the store is unavailable, requests are repeated until it responds, and the workload waits. Wrong contents are read
once more, and are then a failure of the block, which the pager handles like a damaged block of a local image.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import socket
import statistics
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from pageferry.errors import ImageError, PageferryError, StoreError
from pageferry.host.blocking import in_background, on_thread
from pageferry.images.image import SLICE, ImageFile
from pageferry.stores import blocks, entry, tables
from pageferry.stores.address import ImageUrl
from pageferry.stores.blocks import BlockRecord
from pageferry.stores.layout import PackEntry
from pageferry.stores.pull import GAP, Range, ranges, write_blocks
from pageferry.stores.sealing import PLAIN, BlockOpener
from pageferry.stores.store import Store

log = logging.getLogger("pageferry.stores")

T = TypeVar("T")
Number = tuple[int, int]
"""Index of an image in the files of a provider, and number of a storage block in the image."""

MAX_DEMANDS, MAX_PREFETCHES, MIN_PREFETCHES = 32, 32, 8
"""Maximum number of requests at a time: for demanded blocks; for other blocks; for other blocks while demanded blocks
are missing."""
DEMAND_RANGE, PREFETCH_RANGE = 512 << 10, 2 << 20
"""Maximum length of a range with several blocks, bytes. A block has at most about 4 MiB, and usually less than 1."""
DEMAND_GAP = 16 << 10
"""Maximum number of unneeded bytes between two demanded blocks that are read with one request."""
HEDGE = (0.05, 2.0)
"""Minimum and maximum time after which a slow request is sent again, seconds. Between them: three times the median."""
HEDGES = 3
"""Maximum number of further requests at a time for a range that is slow. Each wait is four times as long as the one
before it, up to `MAX_WAIT`."""
MAX_WAIT = 5.0
"""Maximum time between two requests for a range that is slow, seconds."""
READ_TIMEOUT = timedelta(seconds=15)
"""Time without a byte from the store after which a request has failed."""
MAX_HEDGED = 4
"""Number of fetches of demanded blocks above which no request is sent again: they wait for bandwidth."""
PAUSE = (0.1, 5.0)
"""First and longest pause before a failed request is repeated, seconds."""
WARN_AFTER = 2.0
"""Duration of a fetch after which a warning is logged, seconds."""
WARN_PAUSE = 30.0
"""Minimum time between two such warnings, seconds."""
SCAN = 256
"""Number of blocks that are checked at a time before they are fetched in advance."""
READY = 64
"""Number of ranges below which further blocks are checked."""

_REQUEST = struct.Struct("<III")
_REPORT = struct.Struct("<IIII")
_DEMAND, _BACKGROUND, _PREFETCH, _END_OF_ORDER = 1, 2, 3, 4
_PRESENT, _FAILED = 1, 2
_MAX_MESSAGE = 4096


@dataclass(frozen=True, slots=True)
class SuppliedFile:
    """File of an image, and the open file of its block table."""

    descriptor: int
    """Descriptor of the image file, for reading and writing."""
    table: int
    """Descriptor of the block table (`tables`)."""

    def close(self) -> None:
        """Close both files."""
        os.close(self.descriptor)
        os.close(self.table)


@dataclass(frozen=True, slots=True)
class _Table:
    """Places of the storage blocks of one image."""

    descriptor: int
    packs: Sequence[PackEntry]
    records: Sequence[BlockRecord]
    sealing: BlockOpener
    present: bytearray
    """For each block, whether this provider has fetched it."""

    @classmethod
    def read(cls, file: SuppliedFile) -> _Table:
        """Read the table. Raises ImageError, OSError."""
        found = tables.read(file.table)
        records = found.records
        return cls(file.descriptor, found.packs, records, found.sealing(records), bytearray(len(records)))

    def has(self, number: int) -> bool:
        """Return whether the file has the header of a block. Raises OSError."""
        record = self.records[number]
        header = os.pread(self.descriptor, blocks.HEADER, record.offset)
        return header[:4] == blocks.MAGIC and header[blocks.CHECKSUM] == record.checksum

    def is_intact(self, number: int) -> bool:
        """Return whether the file has a block with the right contents. The contents of an encrypted image are not
        compared: its addresses are keyed digests. Raises OSError."""
        if not self.has(number):
            return False
        if self.sealing is not PLAIN:
            return True
        record = self.records[number]
        block = bytearray(os.pread(self.descriptor, record.length, record.offset))
        if record.flags & blocks.NORMAL:
            blocks.normalize(block, number)
        return PLAIN.address(block) == record.digest


class _Fetch:
    """Range that is being fetched from the pack of one image."""

    def __init__(self, image: int, wanted: Range, demand: bool) -> None:
        self.image = image
        self.wanted = wanted
        self.demand = demand
        self.whole = self
        """Fetch of which this is a part."""
        self.error: Exception | None = None
        """Reason why the last request of the whole fetch is repeated; None if it has not failed."""

    @property
    def numbers(self) -> list[Number]:
        """Numbers of the blocks."""
        return [(self.image, number) for number, _ in self.wanted.blocks]

    def single(self, number: int, record: BlockRecord) -> _Fetch:
        """Return the fetch of one block of the range."""
        part = Range(self.wanted.pack, record.start, record.start + record.stored, ((number, record),))
        fetch = _Fetch(self.image, part, self.demand)
        fetch.whole = self.whole
        return fetch


class Provider:
    """Provider of the blocks of images in one entry of the cache.

    `files`: the last images of the chain of the engine; `first`: index of the first of them in the chain; `folder`:
    directory of the entry if the chain consists of all images of the entry, so that the entry is complete when the
    memory is; otherwise None.
    """

    _store: Store | None = None
    _scanning = False
    _is_whole = False
    """Whether `_ordered` contains all blocks that the memory needs, and the files have not been checked yet."""
    _repaired = False
    """Whether blocks that the check has found damaged were fetched again."""
    _warned = -WARN_PAUSE
    """Time of the last warning, seconds."""

    def __init__(self, url: ImageUrl, files: Sequence[SuppliedFile], first: int, folder: Path | None) -> None:
        self._url = url
        self._first = first
        self._files = files
        self._folder = folder
        self._tables: list[_Table] = []
        self._opening = asyncio.Lock()
        self._unusable: str | None = None
        """Reason why no block can be fetched; None if blocks can be fetched."""
        self._demanded: dict[Number, None] = {}
        self._waiting: dict[Number, None] = {}
        """Blocks that a background thread waits for."""
        self._later: deque[Number] = deque()
        self._awaited: deque[_Fetch] = deque()
        """Ranges of `_waiting`. Each block is reported, even if it was fetched before."""
        self._ready: deque[_Fetch] = deque()
        """Ranges of `_later` that are missing in the files."""
        self._flying: dict[Number, asyncio.Task[None]] = {}
        self._running: dict[bool, int] = {True: 0, False: 0}
        """Numbers of fetches: of demanded blocks, of other blocks."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._latencies: deque[float] = deque(maxlen=32)
        self._late: set[_Fetch] = set()
        """Fetches that take long, since the last warning."""
        self._ordered: list[Number] = []
        """All blocks that were to be fetched in advance."""

    async def run(self, connection: socket.socket) -> None:
        """Serve the engine at the other end of a connection until the engine closes it. Closes the files."""
        reader, self._writer = await asyncio.open_connection(sock=connection)
        try:
            await self._open()
            left = b""
            while data := await reader.read(1 << 16):
                left += data
                whole = len(left) - len(left) % _REQUEST.size
                for request in _REQUEST.iter_unpack(left[:whole]):
                    self._take(*request)
                left = left[whole:]
                self._start()
        except OSError as error:  # the process of the engine was killed
            log.info("%s: the connection to the engine was lost: %s", self._url, error)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._writer.close()
            for file in self._files:
                file.close()

    async def _open(self) -> None:
        """Read the tables, and try to open the store."""
        try:
            self._tables = await _on_thread(lambda: [_Table.read(file) for file in self._files])
        except (PageferryError, OSError) as error:
            self._unusable = f"cannot read {self._url}: {error}"
            log.warning("%s", self._unusable)
            return
        with contextlib.suppress(PageferryError, OSError):  # the requests repeat it, and report the error
            await self._connect()

    async def _connect(self) -> Store:
        """Return the store; open it if it is not open. Raises StoreError, UsageError, UnsupportedError."""
        async with self._opening:
            if self._store is None:
                self._store = await _on_thread(
                    lambda: Store(self._url.store, retry_timeout=timedelta(0), read_timeout=READ_TIMEOUT)
                )
            return self._store

    # -- requests

    def _take(self, kind: int, image: int, block: int) -> None:
        number = (image - self._first, block)
        if self._unusable is not None:
            if kind in (_DEMAND, _BACKGROUND):
                self._report(number, self._unusable)
        elif kind == _DEMAND:
            if (task := self._flying.get(number)) is not None:
                self._spawn(self._hurry(number, task))
            else:
                self._demanded[number] = None
        elif kind == _BACKGROUND:
            if number not in self._flying:
                self._waiting[number] = None
        elif kind == _PREFETCH:
            self._later.append(number)
            self._ordered.append(number)
        elif kind == _END_OF_ORDER:
            self._is_whole = True

    def _start(self) -> None:
        """Start fetches, up to the maximum number of each kind."""
        if self._demanded and self._running[True] < MAX_DEMANDS:
            self._start_demands()
        limit = MIN_PREFETCHES if self._running[True] else MAX_PREFETCHES
        while self._awaited and self._running[False] < limit:
            self._launch(self._awaited.popleft())
        while self._ready and self._running[False] < limit:
            self._launch_missing(self._ready.popleft())
        pending = self._waiting or self._later
        if pending and len(self._ready) < READY and not self._scanning:
            self._scanning = True
            self._spawn(self._scan())
        elif self._is_whole and not (pending or self._flying or self._awaited or self._ready or self._scanning):
            self._is_whole = False
            self._spawn(self._complete())

    def _start_demands(self) -> None:
        count = 4 * (MAX_DEMANDS - self._running[True])
        taken = [number for number, _ in zip(list(self._demanded), range(count), strict=False)]
        for number in taken:
            del self._demanded[number]
        limit = DEMAND_RANGE if len(taken) <= MAX_DEMANDS else PREFETCH_RANGE
        for fetch in self._fetches(taken, limit, DEMAND_GAP, demand=True):
            self._launch(fetch)

    def _fetches(self, numbers: Iterable[Number], limit: int, gap: int, *, demand: bool) -> list[_Fetch]:
        """Return the fetches of blocks that are not being fetched, in the order of the images and of their packs."""
        by_image: dict[int, list[tuple[int, BlockRecord]]] = {}
        for image, block in dict.fromkeys(numbers):
            if (image, block) not in self._flying:
                by_image.setdefault(image, []).append((block, self._tables[image].records[block]))
        return [
            _Fetch(image, wanted, demand)
            for image, numbered in by_image.items()
            for wanted in ranges(numbered, self._tables[image].packs, limit, gap)
        ]

    async def _scan(self) -> None:
        """Choose the next blocks to fetch in advance: those that background threads wait for, then the next ones of the
        order that are missing in the files. Another process may have fetched blocks since."""
        waiting, self._waiting = list(self._waiting), {}
        later = [self._later.popleft() for _ in range(min(SCAN, len(self._later)))]
        try:
            missing = await _on_thread(lambda: [one for one in later if not self._tables[one[0]].has(one[1])])
        except OSError:
            missing = later
        self._awaited.extend(self._fetches(waiting, PREFETCH_RANGE, GAP, demand=False))
        self._ready.extend(self._fetches(missing, PREFETCH_RANGE, GAP, demand=False))
        self._scanning = False
        self._start()

    async def _hurry(self, number: Number, task: asyncio.Task[None]) -> None:
        """Wait for a block that is being fetched in advance. If this takes long, fetch it alone, as soon as few
        demanded blocks are being fetched."""
        timeout = self._hedge_timeout
        await asyncio.wait({task}, timeout=timeout)
        while not task.done() and self._running[True] >= MAX_HEDGED:
            timeout = min(2 * timeout, MAX_WAIT)
            await asyncio.wait({task}, timeout=timeout)
        if not task.done():
            image, block = number
            record = self._tables[image].records[block]
            pack = self._tables[image].packs[record.pack]
            wanted = Range(pack, record.start, record.start + record.stored, ((block, record),))
            self._running[True] += 1
            try:
                await self._serve(_Fetch(image, wanted, True))
            finally:
                self._running[True] -= 1

    async def _complete(self) -> None:
        """Record that all blocks that the memory needs are in the files, if they are. Fetch damaged blocks again, once.
        Blocks that this provider has not fetched may be damaged although their headers are present: the host may have
        crashed before they were synced."""
        if (folder := self._folder) is None:
            return

        def check() -> list[Number]:
            left = [(image, number) for image, number in self._ordered if not self._tables[image].present[number]]
            damaged = [(image, number) for image, number in left if not self._tables[image].is_intact(number)]
            if not damaged and any(self._tables[image].sealing is not PLAIN for image, _ in left):
                damaged = left if not self._is_readable(folder) else []
            if not damaged:
                entry.mark_complete(folder, [table.descriptor for table in self._tables])
            return damaged

        with contextlib.suppress(OSError):  # the entry was removed, or the disk is full: the next restore checks again
            damaged = await _on_thread(check, in_background)
            if damaged and not self._repaired:
                self._repaired = self._is_whole = True
                self._ready.extend(self._fetches(damaged, PREFETCH_RANGE, GAP, demand=False))
                self._start()

    def _is_readable(self, folder: Path) -> bool:
        """Return whether all pages of the memory can be read from the files, and match their checksums. `folder`: path
        for messages."""
        try:
            image = ImageFile.from_files([(table.descriptor, folder) for table in self._tables])
            for first in range(0, image.pages, SLICE):
                image.check_pages(first, min(SLICE, image.pages - first))
        except ImageError as error:
            log.info("%s: blocks are fetched again: %s", self._url, error)
            return False
        return True

    # -- fetches

    def _launch_missing(self, fetch: _Fetch) -> None:
        """Start to fetch those blocks of a range that have not been fetched since the range was chosen."""
        present = self._tables[fetch.image].present
        left = [(fetch.image, number) for number, _ in fetch.wanted.blocks if not present[number]]
        for part in self._fetches(left, PREFETCH_RANGE, GAP, demand=False):
            self._launch(part)

    def _launch(self, fetch: _Fetch) -> None:
        self._running[fetch.demand] += 1
        task = self._spawn(self._finish(fetch))
        for number in fetch.numbers:
            self._flying[number] = task

    async def _finish(self, fetch: _Fetch) -> None:
        try:
            await self._serve(fetch)
        finally:
            self._running[fetch.demand] -= 1
            for number in fetch.numbers:
                self._flying.pop(number, None)
        self._start()

    async def _serve(self, fetch: _Fetch) -> None:
        """Fetch a range, and report its blocks."""
        failures: Mapping[int, str]
        watch = self._spawn(self._watch(fetch))
        try:
            failures = await self._obtain(fetch)
        except PageferryError as error:
            failures = dict.fromkeys((number for number, _ in fetch.wanted.blocks), str(error))
        except Exception as error:  # threads of the workload must not wait for ever
            log.exception("%s: cannot fetch blocks", self._url)
            failures = dict.fromkeys((number for number, _ in fetch.wanted.blocks), f"unexpected error: {error!r}")
        finally:
            watch.cancel()
        for number in fetch.numbers:
            self._report(number, failures.get(number[1]))
        self._recover(fetch)

    async def _watch(self, fetch: _Fetch) -> None:
        """Log a warning if blocks for which threads wait, or blocks whose requests fail, are not fetched for long."""
        while True:
            await asyncio.sleep(WARN_AFTER)
            if fetch.demand or fetch.error is not None:
                self._warn(fetch)

    async def _obtain(self, fetch: _Fetch) -> dict[int, str]:
        """Fetch, verify and write the blocks of a range. Return the failures by block. A range with wrong contents is
        read once more, and then block by block."""
        table, wanted = self._tables[fetch.image], fetch.wanted
        where = f"{self._url.store}/{wanted.pack.key}"
        cause: ImageError | None = None

        def write(data: memoryview) -> None:
            write_blocks(table.descriptor, wanted, data, table.sealing)

        for _ in range(2):
            try:
                data = await self._repeat(fetch, lambda: self._read(fetch))
                await self._repeat(fetch, lambda: _on_thread(lambda: write(data)))  # noqa: B023
                return {}
            except ImageError as error:
                cause = error
        if len(wanted.blocks) == 1:
            message = (
                f"{where} is missing, or was damaged, truncated or replaced: {cause}; upload the image again under "
                "another name, with `--reupload`"
            )
            log.warning("%s: %s", self._url, message)
            return {wanted.blocks[0][0]: message}
        failures: dict[int, str] = {}
        for block in wanted.blocks:
            failures |= await self._obtain(fetch.single(*block))
        return failures

    async def _repeat(self, fetch: _Fetch, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call until the store, and the disk of the cache, are available. Raises ImageError."""
        pause, longest = PAUSE
        while True:
            try:
                result = await call()
            except (StoreError, OSError) as error:
                fetch.whole.error = error
            else:
                fetch.whole.error = None
                return result
            await asyncio.sleep(pause * (0.5 + random.random() / 2))
            pause = min(2 * pause, longest)

    def _warn(self, fetch: _Fetch) -> None:
        """Log a warning, unless there was one for a fetch that continues, or a short time ago."""
        now = time.monotonic()
        if self._late or now - self._warned >= WARN_PAUSE:
            if not self._late:
                cause = fetch.error or f"there is no complete reply after {WARN_AFTER:.0f} seconds"
                log.warning(
                    "%s: the workload waits for blocks that cannot be fetched yet: %s; repeating", self._url, cause
                )
                self._warned = now
            self._late.add(fetch)

    def _recover(self, fetch: _Fetch) -> None:
        """Record the end of a fetch."""
        if fetch in self._late:
            self._late.remove(fetch)
            if not self._late:
                log.warning("%s: blocks can be fetched again", self._url)

    @property
    def _hedge_timeout(self) -> float:
        """Time after which a request is slow, seconds."""
        shortest, longest = HEDGE
        usual = 3 * statistics.median(self._latencies) if self._latencies else longest
        return min(max(usual, shortest), longest)

    async def _read(self, fetch: _Fetch) -> memoryview:
        """Read a range. A demanded range that takes long is requested again. Raises ImageError, StoreError."""
        if not fetch.demand:
            return await self._request(fetch.wanted)
        begin = time.monotonic()
        reads = {asyncio.ensure_future(self._request(fetch.wanted))}
        timeout = self._hedge_timeout
        try:
            while True:
                done, reads = await asyncio.wait(reads, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                for read in done:
                    if not reads or read.exception() is None:
                        data = read.result()
                        self._latencies.append(time.monotonic() - begin)
                        return data
                if not done and self._running[True] <= MAX_HEDGED and len(reads) <= HEDGES:
                    reads.add(asyncio.ensure_future(self._request(fetch.wanted)))
                    timeout = min(4 * timeout, MAX_WAIT)
        finally:
            for read in reads:
                read.cancel()

    async def _request(self, wanted: Range) -> memoryview:
        store = self._store or await self._connect()
        return await store.get_range(wanted.pack.key, wanted.start, wanted.end - wanted.start)

    # -- reports

    def _report(self, number: Number, failure: str | None) -> None:
        message = (failure or "").encode(errors="backslashreplace")[:_MAX_MESSAGE]
        if failure is None:
            self._tables[number[0]].present[number[1]] = True
        kind = _PRESENT if failure is None else _FAILED
        self._writer.write(_REPORT.pack(kind, number[0] + self._first, number[1], len(message)) + message)

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: cannot fetch blocks: %s", self._url, error, exc_info=error)


async def _on_thread(call: Callable[[], T], run: Callable[[Callable[[], T]], Awaitable[T]] = on_thread) -> T:
    """Run a call as `on_thread` does, or as `run`. Raises OSError if the system has no thread left, so that the call is
    repeated."""
    try:
        return await run(call)
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise OSError(errno.EAGAIN, "cannot start a thread") from error
