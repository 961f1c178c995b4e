"""Tests of checkpoints of guests (S4): images are exact, and the guests keep running."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import pageferry
from pageferry import errors
from pageferry.checkpoints import events
from pageferry.events import Event
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.workloads.protocols import Migratable
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest import booted
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial
from tests.saved import DigestedWorkload, digests_of_image
from tests.stores.s3_server import create_bucket, s3_server

MakeSerial = Callable[[str], Serial]

SMP = ("-smp", "2")
MEMORY = "160M"
BUSY = "ferry.mib=32 ferry.rate=5000"


async def save(workload: QemuWorkload, path: Path, **options: Any) -> events.CheckpointResult:
    """Take a checkpoint, and compare the image with the memory at the snapshot point. Return the result."""
    digested = DigestedWorkload(workload)
    result = await pageferry.checkpoint_async(cast(Migratable, digested), path, **options)
    assert digests_of_image(ImageFile(path)) == digested.digests
    return result


async def started(parts: GuestParts, serial: Serial) -> QemuWorkload:
    """Start a guest that writes to its memory."""
    return await booted.start("source", parts, serial, *SMP, memory=MEMORY, checker=BUSY)


async def restored(path: Path, parts: GuestParts, serial: Serial, *options: str) -> QemuWorkload:
    """Start a guest from an image without `pageferry restore`: load all memory before the guest runs."""
    image = ImageFile(path)
    workload = await QemuWorkload.start("restored", parts.command(serial, *options, memory=MEMORY), incoming=True)
    (region,) = workload.regions
    for first in range(0, image.pages, 1024):
        data = image.read(first, 1024)
        if data.count(0) != len(data):
            os.pwrite(region.fd, data, region.file_offset + first * 4096)
    await workload.load_state(image.state())
    await workload.resume()
    return workload


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("mode", ["lazy", "stop"])
def test_checkpointed_guest_keeps_running_and_can_be_restored(
    parts: GuestParts, serial: MakeSerial, registry: Registry, tmp_path: Path, mode: str
) -> None:
    async def run() -> None:
        here, there = serial("source"), serial("restored")
        source = await started(parts, here)
        result = await save(source, tmp_path / "image", mode=mode)
        assert result.downtime_parts.device_state > 0
        assert await source.running()
        await here.passes(2)
        copy = await restored(tmp_path / "image", parts, there, *SMP)
        await there.passes(2)
        assert here.bad == there.bad == []
        await copy.discard()
        await source.discard()

    asyncio.run(run())


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("track", [True, False])
def test_chain_of_images_of_a_running_guest_can_be_restored(
    parts: GuestParts, serial: MakeSerial, registry: Registry, tmp_path: Path, track: bool
) -> None:
    async def run() -> None:
        here, there = serial("source"), serial("restored")
        source = await started(parts, here)
        await save(source, tmp_path / "0", track=track)
        for number in range(1, 4):
            later = await save(source, tmp_path / str(number), parent=tmp_path / str(number - 1), track=track)
            assert later.tracking == ("trace" if track else "compare"), later.tracking_note
            assert later.pages.in_parent > 0
        copy = await restored(tmp_path / "3", parts, there, *SMP)
        await there.passes(2)
        await here.passes(1)
        assert here.bad == there.bad == []
        await copy.discard()
        await source.discard()

    asyncio.run(run())


@pytest.mark.usefixtures("huge_pages")
def test_checkpoint_of_memory_on_hugetlbfs(
    parts: GuestParts, serial: MakeSerial, registry: Registry, tmp_path: Path
) -> None:
    """A trap copies a whole huge page. Memory that the guest has never accessed stays a hole."""

    async def run() -> None:
        here = serial("source")
        command = parts.command(here, memory="128M", checker="ferry.mib=32 ferry.rate=2000")
        source = await QemuWorkload.start("source", command, hugetlb=True)
        await here.ready()
        before = os.fstat(source.regions[0].fd).st_blocks
        first = await save(source, tmp_path / "image", bandwidth=128 << 20)
        assert first.traps > 0
        later = await save(source, tmp_path / "child", parent=tmp_path / "image")
        assert later.pages.in_parent > 0
        third = await save(source, tmp_path / "grandchild", parent=tmp_path / "child", at_snapshot_point=64 << 20)
        assert third.tracking == "trace", third.tracking_note
        assert third.pages.in_parent > 0
        assert os.fstat(source.regions[0].fd).st_blocks == before
        await here.passes(2)
        await source.discard()

    asyncio.run(run())


def test_paused_guest_stays_paused_after_a_checkpoint(
    parts: GuestParts, serial: MakeSerial, registry: Registry, tmp_path: Path
) -> None:
    async def run() -> None:
        source = await QemuWorkload.start("source", parts.bare("-m", "64M", "-S"))
        await save(source, tmp_path / "image")
        assert not await source.running()
        await source.discard()

    asyncio.run(run())


def test_no_image_is_left_if_the_guest_dies_during_a_checkpoint(
    parts: GuestParts, serial: MakeSerial, registry: Registry, tmp_path: Path
) -> None:
    async def run() -> None:
        here = serial("source")
        source = await started(parts, here)

        def kill(event: Event) -> None:
            if isinstance(event, events.InstantEvent):
                os.kill(source.pid, 9)

        with pytest.raises(errors.WorkloadDied, match="no image was written"):
            await pageferry.checkpoint_async(source, tmp_path / "image", bandwidth=16 << 20, listener=kill)
        assert os.listdir(tmp_path) == ["source.serial"]
        await source.forget()

    asyncio.run(run())


def test_guest_keeps_running_after_a_refused_checkpoint(
    parts: GuestParts, serial: MakeSerial, registry: Registry, tmp_path: Path
) -> None:
    async def run() -> None:
        here = serial("source")
        source = await started(parts, here)
        with pytest.raises(errors.CheckpointError, match="create its directory"):
            await pageferry.checkpoint_async(source, tmp_path / "none" / "image")
        assert await source.running()
        await here.ticks(2)
        await source.discard()

    asyncio.run(run())


def test_guest_is_saved_to_a_store_while_it_writes_and_restored_from_there(
    parts: GuestParts, serial: MakeSerial, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto", reason="the S3 server of the package moto is not installed")
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))

    async def save_to(source: QemuWorkload, name: str, **options: Any) -> tuple[events.CheckpointResult, Path]:
        digested = DigestedWorkload(source)
        result = await pageferry.checkpoint_async(cast(Migratable, digested), f"s3://images/{name}", **options)
        await pageferry.pull_image_async(f"s3://images/{name}", tmp_path / name)
        assert digests_of_image(ImageFile(tmp_path / name)) == digested.digests
        return result, tmp_path / name

    async def run() -> None:
        here, there = serial("source"), serial("restored")
        source = await started(parts, here)
        first, _ = await save_to(source, "first", track=True)
        second, path = await save_to(source, "second", parent="s3://images/first")
        assert (first.tracking, second.parent is not None) == ("none", True)
        assert second.bytes_written < first.bytes_written
        await here.passes(1)
        copy = await restored(path, parts, there, *SMP)
        await there.passes(2)
        assert here.bad == there.bad == []
        await copy.discard()
        await source.discard()

    with s3_server() as endpoint:
        for name, value in (("ENDPOINT_URL", endpoint), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
            monkeypatch.setenv(f"AWS_{name}", value)
        create_bucket(endpoint, "images")
        asyncio.run(run())
