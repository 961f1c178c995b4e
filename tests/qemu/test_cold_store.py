"""Test of the cold store (S3): a guest's cold memory is evicted and reloaded while the guest verifies its memory."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from pageferry.host.registry import Registry
from pageferry.large_pages.api import sample_async, undo_async
from pageferry.large_pages.events import Sample
from pageferry.large_pages.options import Options
from pageferry.pager import client, records
from pageferry.pager.launcher import take_over
from pageferry.pager.records import Deferred
from pageferry.workloads.qemu.guest import QemuWorkload
from pageferry.workloads.target import Target, open_target_async
from tests.guest import booted
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial


@pytest.fixture(scope="module")
def parts(newest_parts: GuestParts) -> GuestParts:
    """Return the parts of a guest with one QEMU only: the cold store does not depend on the QEMU version."""
    return newest_parts


def test_cold_memory_of_a_guest_is_evicted_and_reloaded(
    parts: GuestParts, serial: Callable[[str], Serial], registry: Registry, root: None
) -> None:
    async def run() -> None:
        line = serial("guest")
        workload = await booted.start("guest", parts, line)
        folder = registry.folder("guest")
        try:
            with await open_target_async("guest") as target:
                before = _resident(target)
                options = Options(sample=1.0, budget=None, window=0.3, rounds=1, reclaim="store")
                result = await sample_async(target, options)
                assert result.broken > 10
                assert result.store is not None
                assert (result.store.pages + result.store.written) * 4096 == _cold(result.samples)
                # The checker verifies all of its memory in turn, so it has already reloaded a part of it.
                assert result.reclaimed > 0.5 * _cold(result.samples)
                assert before > _resident(target)
                await line.passes(2)
                status = await asyncio.to_thread(client.status, folder)
                assert status is not None
                os.kill(status.pager, signal.SIGKILL)
                taken = await take_over(folder)
                assert taken is not None
                assert taken.deferred > 0
                await line.passes(2)
                assert (await undo_async(target)).reloaded > 0
                assert folder.load(records.RECORD, Deferred) is None
                assert _resident(target) >= 0.99 * before
                await line.passes(2)
                assert (await sample_async(target, options)).reclaimed > 0
        finally:
            await (await QemuWorkload.attach("guest")).discard()
            workload.close()
        assert line.bad == []

    asyncio.run(run())


def _resident(target: Target) -> int:
    return sum(os.fstat(region.fd).st_blocks * 512 for region in target.regions)


def _cold(samples: list[Sample]) -> int:
    return sum((512 - one.activity) * 4096 for one in samples if one.decision == "break")
