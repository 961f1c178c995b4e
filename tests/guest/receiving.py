"""Receiver of a guest in the process of the test, with a separate run directory, as on another host."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from pageferry.host.registry import Registry
from pageferry.migration.destination import Destination
from pageferry.migration.incoming import ReceivingHost
from pageferry.migration.ownership import CommitDecisions
from pageferry.migration.receiving import ListenOptions
from pageferry.migration.transport import messages
from pageferry.workloads.protocols import Migratable
from pageferry.workloads.qemu.guest import QemuWorkload


class Receiver:
    """Guest that waits for its source."""

    def __init__(self, guest: QemuWorkload, registry: Registry, **options: Any) -> None:
        self.guest = guest
        self.registry = registry
        self.connections = ListenOptions().open("127.0.0.1:0")
        self.destination = Destination(self.connections, self._prepare, self._host(options))
        self._receiving = asyncio.create_task(self.destination.run())

    @property
    def address(self) -> str:
        """Address for sources."""
        return str(self.connections.address)

    async def received(self) -> QemuWorkload:
        """Wait until the guest runs here and its source knows it. Return the guest."""
        await self._receiving
        await self.destination.finish()
        return self.guest

    async def failed(self) -> BaseException:
        """Wait until the migration has failed, and return the error."""
        (error,) = await asyncio.gather(self._receiving, return_exceptions=True)
        assert isinstance(error, BaseException)
        return error

    @property
    def listens(self) -> bool:
        """Whether no source was accepted yet."""
        return not self.destination.accepted

    async def close(self) -> None:
        """Stop to listen. End the guest, unless it was received or its migration has failed."""
        self._receiving.cancel()
        await asyncio.gather(self._receiving, return_exceptions=True)
        if self.listens:
            await self.guest.discard()
        self.destination.close()
        await self.connections.close()

    def _host(self, options: dict[str, Any]) -> ReceivingHost:
        return ReceivingHost(decisions=CommitDecisions(self.registry.path), registry=self.registry, **options)

    async def _prepare(self, hello: messages.Hello) -> Migratable:
        await self.guest.check_source(hello.details)
        return self.guest


@contextlib.asynccontextmanager
async def receiving(run_directory: Path, name: str, command: Sequence[str], **options: Any) -> AsyncIterator[Receiver]:
    """Start a guest that waits for its source, and yield its receiver. `options`: fields of `ReceivingHost`."""
    registry = Registry(run_directory)
    guest = await QemuWorkload.start(name, command, incoming=True, registry=registry)
    receiver = Receiver(guest, registry, **options)
    try:
        yield receiver
    finally:
        await receiver.close()
