"""Program that uses the public interface with types: checked by `mypy --strict`, and run by a test."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from pathlib import Path
from typing import Unpack

import pageferry


def saved(
    arena: pageferry.Arena, path: Path, **options: Unpack[pageferry.CheckpointArguments]
) -> pageferry.CheckpointResult:
    """Save an arena with options of a checkpoint."""
    return pageferry.checkpoint(arena, path, **options)


async def again(path: Path) -> tuple[pageferry.RestoredArena, pageferry.SharedArena]:
    """Restore an image twice: with separate memory, and with shared memory."""
    return await pageferry.restore_async(path, eager=True), await pageferry.restore_async(path, memory="shared")


def main(folder: Path) -> None:
    """Fill, save and restore an arena by means of the buffer protocol."""
    with pageferry.Arena("1MiB", on_pause=threading.Lock()) as arena:
        view: memoryview = memoryview(arena)
        view[:5] = b"ferry"
        count: int = io.BytesIO(b"boat").readinto(memoryview(arena)[5:])
        result = saved(arena, folder / "image", codec="zstd", bandwidth="1GiB")
        downtime: float = result.downtime
    restored, shared = asyncio.run(again(folder / "image"))
    contents: bytes = bytes(memoryview(restored)[: 5 + count])
    same: bool = bytearray(shared)[: 5 + count] == contents
    written: pageferry.DumpResult = pageferry.dump({"x": contents}, folder / "object")
    info: pageferry.ImageSummary = pageferry.image_info(folder / "object")
    print(contents.decode(), same, downtime >= 0, written.buffers, info.kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
