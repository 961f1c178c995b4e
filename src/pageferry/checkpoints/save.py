"""Checkpoint of a workload while it runs (S4). `Save.run` is the whole sequence."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pageferry import values
from pageferry.checkpoints.attempt import Attempt, attempt
from pageferry.checkpoints.events import CheckpointResult
from pageferry.checkpoints.options import Options
from pageferry.checkpoints.preparation import Preparation
from pageferry.checkpoints.request import Request
from pageferry.checkpoints.statistics import Phase, Statistics
from pageferry.errors import CheckpointError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import beside_loop, synchronous
from pageferry.host.fault_points import fault_point
from pageferry.images.image import ImageFile, new_file
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.callbacks import check_listener
from pageferry.workloads.managed import saveable
from pageferry.workloads.protocols import Saveable


async def checkpoint_async(
    workload: Arena | Saveable,
    path: str | Path,
    *,
    parent: str | Path | None = None,
    listener: Listener = ignore,
    **options: Any,
) -> CheckpointResult:
    """Save a running workload to an image, while the workload keeps running. The image appears at `path` when it is
    complete.

    With `parent`, an earlier image of the same workload, only pages that differ from the parent are stored, and the new
    image requires the parent. `options` are the fields of `pageferry.checkpoints.options.Options`: mode, codec,
    bandwidth (bytes per second), track, packers; in bytes trap_block, page_block, storage_block, staging,
    at_snapshot_point.
    `listener` is called with an event for every step.

    Raises CheckpointError if no image was written, for example because the disk is full; the workload keeps running.
    Raises ImageError if the parent cannot be used, WorkloadDied, WorkloadError, UsageError.
    """
    saveable(workload)
    chosen = values.options(Options, options)
    target, older = values.path("path", path), values.optional(values.path, "parent", parent)
    values.function("listener", listener)
    check_listener("listener", listener)
    if isinstance(workload, Arena):
        workload.check_here()
        arena = workload
        return await beside_loop(lambda heard: save(arena.workload(), target, older, chosen, heard), listener)
    return await save(workload, target, older, chosen, listener)


checkpoint = synchronous(checkpoint_async)


async def save(
    workload: Saveable, path: Path, parent: Path | None, options: Options, listener: Listener
) -> CheckpointResult:
    """Like `checkpoint_async`, but with arguments that have been checked."""
    if workload.live is None:
        options = replace(options, mode="stop")
    statistics = Statistics(options.mode)
    request = Request(
        workload=workload,
        path=path,
        options=options,
        listener=listener,
        parent=ImageFile(parent) if parent is not None else None,
    )
    return await Save(request, statistics).run()


class Save:
    """One checkpoint of one workload."""

    def __init__(self, request: Request, statistics: Statistics) -> None:
        self.request = request
        self.statistics = statistics
        self._preparation = Preparation(request, statistics)

    async def run(self) -> CheckpointResult:
        """Save the workload. After an error, the workload keeps running, and the unfinished image is removed."""
        try:
            with _writing(self.request.path), new_file(self.request.path) as file:
                await self._preparation.set_up()
                finished = await self._save(file)
            self.statistics.enter(Phase.PUBLISHED)
            fault_point("checkpoint.published")
            await self._preparation.leave_trace(finished.covers_memory)
            return self.statistics.result(self.request)
        finally:
            await asyncio.shield(self._preparation.close())

    async def _save(self, file: int) -> Attempt:
        """Make an attempt, and another one without a trace if the trace since the parent cannot be used."""
        first = attempt(self._preparation, file)
        try:
            await first.run()
            return first
        except LookupError as lost:
            why = str(lost)
            await self._preparation.lose_trace(why)
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
        second = attempt(self._preparation, file)
        await second.run()
        return second


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Translate every OSError of the block to CheckpointError."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free some space, or choose another file system",
            errno.EDQUOT: "the quota is exhausted",
            errno.ENOENT: "its directory does not exist",
        }.get(error.errno or 0, "the workload keeps running")
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
