"""Checkpoint of a workload while it runs (S4). `Save.run` is the whole sequence."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from pageferry import values
from pageferry.checkpoints.attempt import Attempt, attempt
from pageferry.checkpoints.events import CheckpointResult
from pageferry.checkpoints.image_source import NO_KEY, image_argument, local_image_async
from pageferry.checkpoints.options import CheckpointArguments, Options
from pageferry.checkpoints.preparation import Preparation
from pageferry.checkpoints.request import Request
from pageferry.checkpoints.statistics import Phase, Statistics
from pageferry.checkpoints.target import Target, target
from pageferry.errors import CheckpointError, UsageError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import beside_loop, synchronous
from pageferry.host.fault_points import fault_point
from pageferry.images.image import ImageFile
from pageferry.stores.address import is_url
from pageferry.stores.lazy_image import fetch, open_image_file
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.callbacks import check_listener
from pageferry.workloads.managed import HasArena, saveable
from pageferry.workloads.protocols import Saveable, clone_of

if TYPE_CHECKING:
    from pageferry.pager.base_records import CloneRecord


async def checkpoint_async(
    workload: Arena | HasArena | Saveable,
    path: str | Path,
    *,
    parent: str | Path | None = None,
    listener: Listener = ignore,
    **options: Unpack[CheckpointArguments],
) -> CheckpointResult:
    """Save a running workload to an image, while the workload keeps running. The image appears at `path` when it is
    complete. `path` and `parent` can be URLs of images in a store (docs/stores.md).

    With `parent`, an earlier image of the same workload, only pages that differ from the parent are stored, and the new
    image requires the parent. The parent of a clone is always the image that the clone shares; only its private pages
    are stored. `options` are the fields of `pageferry.checkpoints.options.Options`: mode, disks, codec, track, packers,
    bandwidth (bytes per second), and the sizes trap_block, page_block, storage_block, staging and at_snapshot_point
    (bytes). With `key` or `key_command`, an image in a store is encrypted. The same key opens a parent in a store;
    `allow_plain` also accepts one that is not encrypted. `listener` is called with an event for every step.

    Raises CheckpointError if no image was written, for example because the disk is full; the workload keeps running.
    Raises StoreError if a store cannot be used, before or while the workload is saved; the workload keeps running.
    Raises ImageError if the parent cannot be used, or if the store has an image of this name, WorkloadDied if the
    workload exits. Also raises WorkloadError and UsageError.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> memoryview(arena)[0] = 7
        >>> result = pageferry.checkpoint(arena, "first.img")
        >>> memoryview(arena)[4096] = 8
        >>> result = pageferry.checkpoint(arena, "second.img", parent="first.img")
        >>> print(result.pages.data, result.pages.in_parent)  # one page has changed
        1 1
    """
    workload = saveable(workload)
    chosen = values.options(Options, options)
    place, older = target("path", path, chosen), values.optional(image_argument, "parent", parent)
    values.function("listener", listener)
    check_listener("listener", listener)
    if isinstance(workload, Arena):
        workload.check_here()
        arena = workload
        return await beside_loop(lambda heard: save(arena.workload(), place, older, chosen, heard), listener)
    return await save(workload, place, older, chosen, listener)


checkpoint = synchronous(checkpoint_async)


async def save(
    workload: Saveable, place: Target, parent: str | Path | None, options: Options, listener: Listener
) -> CheckpointResult:
    """Save a workload as `checkpoint_async` does, with arguments that have been checked."""
    if options.allow_plain and not is_url(parent):
        raise UsageError("`allow_plain` has no effect without a `parent` in a store; remove it")
    if workload.live is None:
        options = replace(options, mode="stop")
    place.check(options, None)  # before the parent is downloaded
    await place.prepare()
    statistics = Statistics(options.mode)
    clone = clone_of(workload)
    async with _local(parent, options) as local:
        older = _open_parent(workload.name, clone, local, options)
        request = Request(
            workload=workload, target=place, options=options, listener=listener, parent=older, clone=clone
        )
        if older is not None:
            await fetch(older)  # the saver compares pages, and must not wait for a store
        return await Save(request, statistics).run()


def _local(parent: str | Path | None, options: Options) -> AbstractAsyncContextManager[Path | None]:
    """Return the context in which the parent is available as a file."""
    if parent is None:
        return contextlib.nullcontext(None)
    return local_image_async("parent", parent, options if is_url(parent) else NO_KEY)


def _open_parent(name: str, clone: CloneRecord | None, path: Path | None, options: Options) -> ImageFile | None:
    """Return the parent of the new image: for a clone, the image that it shares."""
    if clone is not None:
        if options.track:
            raise UsageError(f"cannot use `track` for {name}: a checkpoint of a clone needs no trace; omit `track`")
        from pageferry.workloads.clone_view import open_image

        return open_image(name, clone, path)
    return open_image_file(path) if path is not None else None


class Save:
    """One checkpoint of one workload."""

    def __init__(self, request: Request, statistics: Statistics) -> None:
        self.request = request
        self.statistics = statistics
        self._preparation = Preparation(request, statistics)
        self._last: Attempt | None = None
        """Last attempt."""

    async def run(self) -> CheckpointResult:
        """Save the workload. After an error, the workload keeps running, and the unfinished image is removed."""
        try:
            finished = await self._write()
            self.statistics.enter(Phase.PUBLISHED)
            fault_point("checkpoint.published")
            await self._preparation.leave_trace(finished.covers_memory)
            return self.statistics.result(self.request)
        finally:
            await asyncio.shield(self._preparation.close())

    async def _write(self) -> Attempt:
        """Write and publish the image. After an error, undo what was changed in the disks of the workload."""
        try:
            place = self.request.target
            with writing(place.place):
                async with place.opened(self.request.parent, self.request.listener) as file:
                    await self._preparation.set_up()
                    saved = await self._save(file)
                    if place.uploads:
                        self.statistics.enter(Phase.UPLOAD)
                    return saved
        except BaseException:
            if self._last is not None:
                await asyncio.shield(self._last.abandon())
            raise

    async def _save(self, file: int) -> Attempt:
        """Make an attempt, and another one without a trace if the trace since the parent cannot be used."""
        place = self.request.target
        self._last = first = attempt(self._preparation, file)
        try:
            await place.during(first.run())
            return first
        except LookupError as lost:
            why = str(lost)
            await first.abandon()
            await self._preparation.lose_trace(why)
            await place.restart(file)
        self._last = second = attempt(self._preparation, file)
        await place.during(second.run())
        return second


@contextlib.contextmanager
def writing(path: Path | str, otherwise: str = "the workload keeps running") -> Iterator[None]:
    """Translate every OSError of the block to CheckpointError. `otherwise`: advice for errors without specific
    advice."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free some space, or choose another file system",
            errno.EDQUOT: "free some space, or raise the quota",
            errno.ENOENT: "create its directory",
        }.get(error.errno or 0, otherwise)
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
