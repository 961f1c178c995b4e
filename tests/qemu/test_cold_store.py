"""No cold store for guests yet: it is refused before anything is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from pageferry.errors import UnsupportedError
from pageferry.host.registry import Registry
from pageferry.largepages.api import Options, sample
from pageferry.workloads import deferred
from pageferry.workloads.qemu import QemuWorkload
from pageferry.workloads.targets import open_target
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial


def test_a_guest_is_refused_and_runs_on(
    parts: GuestParts, serial: Callable[[str], Serial], registry: Registry, root: None
) -> None:
    async def run() -> None:
        line = serial("guest")
        workload = await QemuWorkload.start("guest", parts.command(line))
        try:
            await line.ready()
            with await open_target("guest") as target, pytest.raises(UnsupportedError, match="QEMU guest"):
                await sample(target, Options(sample=1.0, reclaim="store"))
            assert not deferred.is_restoring(registry.folder("guest"))
            await line.passes(1)
        finally:
            await workload.discard()

    asyncio.run(run())
