"""Tests of huge page sampling (S3): huge pages are sampled and restored while the guest verifies its memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from pageferry._engine import Space
from pageferry.host.registry import Registry
from pageferry.large_pages.api import sample_async
from pageferry.large_pages.options import Options
from pageferry.workloads.qemu.guest import QemuWorkload
from pageferry.workloads.target import workload_target
from tests.guest import booted
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial
from tests.kernel.swap import swap_space


@pytest.fixture(scope="module")
def parts(newest_parts: GuestParts) -> GuestParts:
    """Return the parts of a guest with one QEMU only: sampling does not depend on the QEMU version.

    Saved states are not used: the idle memory must be in QEMU's page tables, as after a boot.
    """
    return replace(newest_parts, states=None)


def test_huge_pages_of_a_guest_are_sampled_and_restored(
    parts: GuestParts, serial: Callable[[str], Serial], registry: Registry
) -> None:
    async def run() -> None:
        line = serial("guest")
        workload = await booted.start("guest", parts, line)
        try:
            with workload_target(workload) as target:
                (area,) = target.areas
                space = Space(area.pid)
                before = _size(space.large_mapped(area.address, area.length))
                assert before > 0
                options = Options(sample=0.5, budget=None, window=0.1, rounds=4)
                result = await sample_async(target, options)
                assert {one.address for one in result.samples} <= set(area.large_pages())
                assert len(result.samples) == result.estimate.large_pages, "expected a sample of every huge page"
                assert any(one.activity for one in result.samples), "expected accesses by the checker"
                assert sum(not one.activity for one in result.samples) > 10, "expected idle memory"
                assert result.not_restored == 0
                assert _size(space.large_mapped(area.address, area.length)) >= before
                await line.passes(2)
        finally:
            await (await QemuWorkload.attach("guest")).discard()
        assert line.bad == []

    asyncio.run(run())


def test_cold_memory_of_a_guest_is_swapped_out(
    parts: GuestParts, serial: Callable[[str], Serial], registry: Registry, root: None
) -> None:
    """The kernel swaps out the memory file's pages, and swaps them in with unchanged contents on access."""

    async def run() -> None:
        line = serial("guest")
        workload = await booted.start("guest", parts, line)
        try:
            with workload_target(workload) as target:
                options = Options(sample=1.0, budget=None, window=0.2, rounds=1, reclaim="swap")
                result = await sample_async(target, options)
            assert result.broken > 10
            # Pages that the guest accesses are swapped in before they are counted.
            assert result.reclaimed > 0
            await line.passes(2)
        finally:
            await (await QemuWorkload.attach("guest")).discard()
        assert line.bad == []

    with swap_space(512 << 20):
        asyncio.run(run())


def _size(runs: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in runs)
