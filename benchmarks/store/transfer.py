"""Copy of a file to or from a bucket with obstore: `python -m benchmarks.store.transfer get|put BUCKET KEY FILE`.

A download is what a user without pageferry does before a restore: ranges of 8 MiB, 32 at a time, written to a file.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from pageferry.stores import library

obstore = library.obstore()  # prevents that threads of obstore abort this process at its end

RANGE, REQUESTS = 8 << 20, 32


async def _copy(store: Any, key: str, descriptor: int, start: int, end: int, slots: asyncio.Semaphore) -> None:
    async with slots:
        data = memoryview(await obstore.get_range_async(store, key, start=start, end=end))
        await asyncio.to_thread(os.pwrite, descriptor, data, start)


async def _transfer(direction: str, bucket: str, key: str, path: str) -> None:
    store = obstore.store.S3Store(bucket, endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})
    if direction == "put":
        await obstore.put_async(store, key, Path(path))
        return
    length = (await obstore.head_async(store, key))["size"]
    slots = asyncio.Semaphore(REQUESTS)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        starts = range(0, length, RANGE)
        await asyncio.gather(*(_copy(store, key, descriptor, at, min(at + RANGE, length), slots) for at in starts))
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    asyncio.run(_transfer(*sys.argv[1:5]))
