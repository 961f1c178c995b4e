"""Tests of guests that share the memory of their image: private pages over one base (S10)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.events import RunningEvent
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.errors import NameInUse, PageferryError, RestoreError, UnsupportedError, UsageError
from pageferry.host import fault_points, smaps
from pageferry.host.registry import Registry
from pageferry.pager import base_records
from pageferry.pager.base_protocol import BaseStatus, CloneStatus
from pageferry.pager.launcher import take_over
from pageferry.workloads.bases import describe_bases
from pageferry.workloads.inventory import describe_all
from pageferry.workloads.qemu.guest import QemuWorkload
from pageferry.workloads.target import workload_target
from tests.guest.clones import Clone, kill_pager, status_of, until_gone
from tests.guest.machines import GuestParts
from tests.guest.restored import OPTIONS, image_of_a_guest
from tests.guest.serial import Serial

MakeSerial = Callable[[str], Serial]
MIB = 1 << 20


@pytest.fixture(scope="module")
def image(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of an image of a running guest."""
    return image_of_a_guest(parts, tmp_path_factory.mktemp("image"))


Make = Callable[[str], Clone]


@pytest.fixture
def clone(parts: GuestParts, serial: MakeSerial, registry: Registry) -> Make:
    """Return a function that creates a `Clone` by name. The test starts the guest."""
    return lambda name: Clone(name, parts, serial(name))


def of(status: BaseStatus, name: str) -> CloneStatus:
    """Return the state of one clone."""
    return next(one for one in status.clones if one.name == name)


@pytest.mark.oldest_qemu
def test_two_clones_read_correct_pages_from_one_base(clone: Make, image: Path) -> None:
    async def run() -> None:
        first, second = clone("first"), clone("second")
        await first.start(image)
        await first.serial.passes(2)
        filled = await status_of(image)
        assert of(filled, "first").missed > 16
        await second.start(image)
        await second.serial.passes(2)
        both = await status_of(image)
        assert both.pager == filled.pager
        second_clone = of(both, "second")
        assert second_clone.missed <= 8
        assert second_clone.faults == second_clone.missed + second_clone.zeros
        assert both.resident <= filled.resident + 16 * MIB
        for one in (first, second):
            assert 0 < one.private < both.resident
            await one.workload.discard()
        await until_gone(image)

    asyncio.run(run())


def test_pager_that_takes_over_serves_all_clones_from_the_same_file(clone: Make, image: Path) -> None:
    async def run() -> None:
        first, second = clone("first"), clone("second")
        await first.start(image)
        await second.start(image)
        before = await status_of(image)
        await kill_pager(image)
        (stalled,) = describe_bases()
        assert (stalled.pager, sorted(stalled.clones)) == (None, ["first", "second"])
        assert "restore --takeover" in (stalled.stall_reason or "")
        moved = image.with_name("moved")
        os.link(image, moved)
        await take_over(first.folder, moved)
        records = [base_records.clone_record(one.folder) for one in (first, second)]
        assert [one and one.image for one in records] == [str(moved)] * 2
        with pytest.raises(RestoreError, match="its pager is running"):
            await take_over(second.folder)
        moved.unlink()
        after = await status_of(image)
        assert {one.name for one in after.clones} == {"first", "second"}
        assert after.deferred <= before.deferred
        await first.serial.passes(2)
        await second.serial.passes(2)
        await kill_pager(image)
        third = clone("third")
        await third.start(image, prefetch=True)
        assert {one.name for one in (await status_of(image)).clones} == {"first", "second", "third"}
        for one in (first, second, third):
            await one.serial.passes(2)
            await one.workload.discard()
        await until_gone(image)

    asyncio.run(run())


def test_killed_clone_leaves_the_others_running(clone: Make, image: Path) -> None:
    async def run() -> None:
        first, second = clone("first"), clone("second")
        await first.start(image)
        await second.start(image)
        os.kill(first.workload.pid, signal.SIGKILL)
        await first.workload.ended()
        await first.workload.forget()
        await second.serial.passes(2)
        assert [one.name for one in (await status_of(image)).clones] == ["second"]
        await second.workload.discard()
        await until_gone(image)

    asyncio.run(run())


@pytest.mark.parametrize("point", ["base.published", "clone.replaced", "clone.registered"])
def test_pager_killed_during_a_start_leaves_nothing(
    clone: Make, image: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        failed = clone("failed")
        monkeypatch.setenv(fault_points.VARIABLE, f"{point}=kill")
        with pytest.raises(PageferryError):
            await failed.start(image)
        monkeypatch.delenv(fault_points.VARIABLE)
        assert "failed" not in Registry().entries()
        assert describe_bases() == []
        assert base_records.base_folders(Registry()) == []
        retried = clone("failed")
        await retried.start(image)
        await retried.serial.passes(1)
        await retried.workload.discard()
        await until_gone(image)

    asyncio.run(run())


def test_operation_on_memory_of_a_clone_is_refused(clone: Make, image: Path) -> None:
    async def run() -> None:
        refused = clone("refused")
        await refused.start(image)
        attached = await QemuWorkload.attach("refused")
        with pytest.raises(UnsupportedError, match=r"is a clone.*--memory own"):
            workload_target(attached)
        attached.close()
        (info,) = await describe_all()
        assert info.status == "running"
        assert info.resident is not None
        assert info.memory is not None
        assert 0 < info.resident < info.memory
        assert info.deferred > 0
        assert info.stall_reason is None
        (found,) = describe_bases()
        assert (found.clones, found.pager) == (["refused"], (await status_of(image)).pager)
        await pageferry.pause_async("refused")
        await pageferry.resume_async("refused")
        await refused.serial.passes(1)
        await pageferry.stop_async("refused")
        await until_gone(image)

    asyncio.run(run())


def test_discard_of_a_clone_is_refused_and_keeps_its_page(clone: Make, image: Path) -> None:
    async def run() -> None:
        one = clone("ballooned")
        await one.start(image)
        await pageferry.qmp_async("ballooned", "balloon", {"value": 200 * MIB})
        await one.serial.passes(3)
        record = base_records.clone_record(one.folder)
        assert record is not None
        mapped = [found for found in smaps.smaps(record.pid) if found.mapping.length == record.length]
        assert all("lo" in found.flags for found in mapped)
        await one.workload.discard()
        await until_gone(image)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "message"),
    [(("-overcommit", "mem-lock=on"), "memory is locked"), (("-mem-prealloc",), "allocates all of its memory")],
)
def test_memory_that_cannot_be_shared_is_refused(
    clone: Make, image: Path, options: tuple[str, ...], message: str
) -> None:
    async def run() -> None:
        refused = clone("refused")
        refused.command += options
        with pytest.raises(UnsupportedError, match=rf"{message}.*--memory own"):
            await refused.start(image)
        assert "refused" not in Registry().entries()
        await until_gone(image)

    asyncio.run(run())


def test_hugetlb_cannot_be_combined_with_shared_memory(image: Path) -> None:
    with pytest.raises(UsageError, match="hugetlb"):
        asyncio.run(restore_guest("never", image, ["qemu-system-x86_64"], hugetlb=True, memory="shared"))


def test_clones_start_side_by_side_with_own_names(parts: GuestParts, image: Path, tmp_path: Path) -> None:
    async def run() -> None:
        command = parts.command(Serial(tmp_path / "{name}.serial"), *OPTIONS)
        result = await pageferry.clone_async(image, command, count=3, name="web-{n}")
        assert [one.name for one in result.clones] == ["web-1", "web-2", "web-3"]
        assert all(0 < one.time_to_running <= result.time_to_all_running for one in result.clones)
        status = await status_of(image)
        assert {one.pid for one in status.clones} == {one.pid for one in result.clones}
        for one in result.clones:
            assert one.private is not None
            assert one.private < status.length // 4
            await Serial(tmp_path / f"{one.name}.serial").passes(2)
            await pageferry.stop_async(one.name)
        await until_gone(image)

    asyncio.run(run())


@pytest.mark.parametrize("memory", ["shared", "own"])
def test_restore_cancelled_after_the_resume_leaves_no_guest(clone: Make, image: Path, memory: str) -> None:
    async def run() -> None:
        def cancel(event: object) -> None:
            if isinstance(event, RunningEvent):
                restoring.cancel()

        command = clone("cancelled").command
        restoring = asyncio.ensure_future(restore_guest("cancelled", image, command, memory=memory, listener=cancel))
        with pytest.raises(asyncio.CancelledError):
            await restoring
        assert Registry().entries() == {}
        await until_gone(image)

    asyncio.run(run())


def test_failed_clone_ends_the_others(parts: GuestParts, image: Path, tmp_path: Path, registry: Registry) -> None:
    async def run() -> None:
        taken = registry.claim("web-2")
        try:
            command = parts.command(Serial(tmp_path / "{name}.serial"), *OPTIONS)
            with pytest.raises(NameInUse):
                await pageferry.clone_async(image, command, count=2, name="web-{n}")
        finally:
            taken.release()
        await until_gone(image)

    asyncio.run(run())


@pytest.mark.parametrize(("name", "message"), [("web", "expected {n} in the name"), ("/{n}", "invalid workload")])
def test_names_of_clones_are_checked_before_a_start(image: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pageferry.clone(image, ["qemu-system-x86_64"], count=2, name=name)
