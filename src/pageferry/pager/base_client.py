"""Connection of a command or a program to the pager that serves the base of an image."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from pageferry.errors import RestoreError
from pageferry.host.blocking import in_thread
from pageferry.host.registry import Registry
from pageferry.images.metadata import ImageIdentity, Metadata
from pageferry.pager import base_records
from pageferry.pager.base_records import BaseFolder
from pageferry.pager.launcher import (
    PagerConnection,
    PagerProcess,
    connect_to_base,
    connect_to_pager,
    connect_to_pager_of,
)
from pageferry.pager.orders import BaseElsewhere, BaseOpened

_EXIT_TIMEOUT = 5.0
"""Maximum time to wait for the exit of a pager that refuses clients, seconds."""


@dataclass(frozen=True, slots=True)
class OpenedBase:
    """Base of an image, and the connection to its pager."""

    pager: PagerConnection
    opened: BaseOpened
    metadata: Metadata
    state: bytes

    @property
    def identity(self) -> ImageIdentity:
        """Identity of the image."""
        return self.opened.identity


async def connect(registry: Registry, image: Path, expected: ImageIdentity | None = None) -> OpenedBase:
    """Connect to the pager of the base of an image, and start one if none is running.

    `expected`: required identity of the image. Raises ImageError, RestoreError, WorkloadError.
    """
    running = await in_thread(connect_to_base, registry, image)
    pager = running if running is not None else await in_thread(PagerProcess)
    try:
        found = await pager.open(image, image.name, expected)
        pager, opened = await open_base(pager, registry)
    except BaseException:
        pager.give_up()
        raise
    return OpenedBase(pager, opened, found.metadata, found.state)


async def connect_to_loader(registry: Registry, image: Path, identity: ImageIdentity) -> PagerConnection:
    """Connect to the pager that serves the base of this identity, even if the path of the image now leads to another
    file. If none is running, start one from `image`. Raises ImageError, RestoreError, WorkloadError."""
    running = await in_thread(connect_to_pager_of, BaseFolder.of(registry, identity), identity)
    return running if running is not None else (await connect(registry, image, identity)).pager


async def connect_by_identity(
    registry: Registry, identity: ImageIdentity, image: Path
) -> tuple[PagerConnection, BaseOpened]:
    """Open the base of this identity: the one of a running pager, otherwise one that is filled from `image`. Return the
    connection to its pager, and the base.

    Raises ImageError, RestoreError, WorkloadError.
    """
    running = await in_thread(connect_to_pager_of, BaseFolder.of(registry, identity), identity)
    if running is not None:
        try:
            return await open_base(running, registry)
        except BaseException:
            running.close()
            raise
    base = await connect(registry, image, identity)
    return base.pager, base.opened


def open_file(opened: BaseOpened, image: str | Path) -> int:
    """Open the file of a base, for reading. `image`: path for error messages. Raises RestoreError."""
    try:
        return base_records.reopen(opened.pager, opened.descriptor, opened.device, opened.inode)
    except OSError as refused:
        raise RestoreError(
            f"cannot open the base of {image}: {refused.strerror or refused}; retry, or use separate memory (`own`)"
        ) from refused


async def open_base(pager: PagerConnection, registry: Registry) -> tuple[PagerConnection, BaseOpened]:
    """Open the base of the image that `pager` has opened. Return the pager that serves the base: `pager`, or another
    one; in that case, `pager` is closed.

    Raises RestoreError, WorkloadError, ImageError.
    """
    opened = await pager.open_base(registry)
    if isinstance(opened, BaseElsewhere):
        return await _other_pager(pager, opened, registry)
    return pager, opened


async def _other_pager(
    own: PagerConnection, elsewhere: BaseElsewhere, registry: Registry
) -> tuple[PagerConnection, BaseOpened]:
    """Connect to the pager that serves the base, and close the connection to `own`. If that pager is exiting, return
    `own`, which then serves the base. Raises RestoreError."""
    deadline = time.monotonic() + _EXIT_TIMEOUT
    while True:
        try:
            found = await _connect(elsewhere, registry)
        except (OSError, RestoreError) as failed:
            if time.monotonic() > deadline:
                raise RestoreError(f"cannot connect to the pager of the base ({failed}); retry") from failed
        else:
            own.close()
            return found
        await asyncio.sleep(0.02)
        again = await own.open_base(registry)
        if isinstance(again, BaseOpened):
            return own, again
        elsewhere = again


async def _connect(elsewhere: BaseElsewhere, registry: Registry) -> tuple[PagerConnection, BaseOpened]:
    pager = await in_thread(connect_to_pager, elsewhere.socket, elsewhere.pager)
    try:
        opened = await pager.open_base(registry)
        if isinstance(opened, BaseElsewhere):
            raise RestoreError("the pager is exiting")
    except BaseException:
        pager.close()
        raise
    pager.limit_waiting(False)
    return pager, opened
