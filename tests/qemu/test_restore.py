"""Tests of restored guests (S10, S8), which run with correct contents before all of their memory is loaded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.events import ProgressEvent, RunningEvent, TouchedEvent
from pageferry.checkpoints.restore_guest import completed, restore_guest
from pageferry.errors import RestoreError, UsageError
from pageferry.events import Event
from pageferry.host import proc, processes
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.pager import records
from pageferry.pager.launcher import take_over
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts
from tests.guest.restored import OPTIONS, Restored, image_of_a_guest
from tests.guest.serial import Serial
from tests.kernel.programs import Program

MakeSerial = Callable[[str], Serial]


@pytest.fixture(scope="module")
def image(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of an image of a running guest."""
    return image_of_a_guest(parts, tmp_path_factory.mktemp("image"))


@pytest.fixture
def guest(parts: GuestParts, serial: MakeSerial, registry: Registry) -> Callable[[str], Restored]:
    """Return a function that creates a `Restored` by name. The test restores the guest."""
    return lambda name: Restored(name, parts, serial(name))


Make = Callable[[str], Restored]


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("prefetch", [True, False])
def test_restored_guest_runs_with_correct_pages(guest: Make, image: Path, prefetch: bool) -> None:
    async def run() -> None:
        restored = guest("restored")
        result = await restored.start(image, prefetch=prefetch)
        assert result.status == "active"
        assert result.deferred > 32 << 20
        if prefetch:
            await restored.arrived()
            assert not (restored.folder.path / records.RECORD).exists()
            assert not (restored.folder.path / records.FLAGS).exists()
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


def test_completed_restore_leaves_no_trace_of_the_pager(guest: Make, image: Path) -> None:
    async def run() -> None:
        restored = guest("restored")
        await restored.start(image, eager=True)
        status = await restored.status()
        await restored.arrived()
        if status is not None and (started := proc.start_time(status.pager)) is not None:
            await processes.wait_for_end(status.pager, started)
        assert _traps_of(restored.workload.pid) == []
        await restored.end()

    asyncio.run(run())


def _traps_of(pid: int) -> list[str]:
    """Return what a pager has left in a process: userfaultfds, registered mappings, huge pages mapped by PTEs."""
    folder = Path(f"/proc/{pid}")
    names = [os.readlink(entry) for entry in (folder / "fd").iterdir()]
    left = [name for name in names if "userfaultfd" in name]
    lines = (folder / "smaps").read_text().splitlines()
    left += [line for line in lines if line.startswith("VmFlags") and {"um", "ui"} & set(line.split())]
    large = max(int(line.split()[1]) for line in lines if line.startswith("ShmemPmdMapped"))
    return left + ([f"only {large} KiB are mapped as huge pages"] if large < 65536 else [])


def test_restore_reports_progress_faults_and_windows(guest: Make, image: Path) -> None:
    async def run() -> None:
        restored = guest("restored")
        begun = await restored.start(image)
        told: list[Event] = []
        result = await completed(restored.folder, begun, told.append)
        assert result.status == "completed"
        assert result.missed >= begun.missed > 0
        assert 0 < sum(result.service_times.bins) <= result.faults
        assert 0 < result.service_times.p50_us <= result.service_times.p99_us <= result.longest_us
        left = [event.deferred for event in told if isinstance(event, ProgressEvent)]
        assert left == sorted(left, reverse=True)
        touched = [window for event in told if isinstance(event, TouchedEvent) for window in event.windows]
        assert 0 < len(set(touched)) <= result.missed
        assert left[-1] == 0
        assert max(touched) < result.memory // (16 * 4096)
        await restored.end()

    asyncio.run(run())


def test_another_pager_takes_over_from_a_killed_one(guest: Make, image: Path) -> None:
    async def run() -> None:
        restored = guest("restored")
        await restored.start(image, prefetch=False)
        for _ in range(3):
            await restored.kill_pager()
            with pytest.raises(RestoreError, match="--takeover restored"):
                await restored.status()
            status = await take_over(restored.folder)
            assert status is not None
            with pytest.raises(RestoreError, match="its pager is running"):
                await take_over(restored.folder)
            await restored.serial.ticks(1)
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


POINTS = ["opened", "registered", "taken-over"]


@pytest.mark.parametrize("point", POINTS)
def test_restore_fails_if_its_pager_is_killed_before_the_guest_runs(
    guest: Make, image: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """The failed restore removes the guest's directory, and can be repeated under the same name."""

    async def run() -> None:
        restored = guest("restored")
        monkeypatch.setenv("PAGEFERRY_FAULT", f"pager.{point}=kill")
        with pytest.raises(RestoreError, match="cannot start the pager: it exited"):
            await restored.start(image)
        assert not restored.folder.path.exists()
        monkeypatch.delenv("PAGEFERRY_FAULT")
        await restored.start(image)
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


@pytest.mark.parametrize("point", POINTS)
def test_pager_killed_during_a_takeover_can_be_replaced(
    guest: Make, image: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    async def run() -> None:
        restored = guest("restored")
        await restored.start(image, prefetch=False)
        await restored.kill_pager()
        monkeypatch.setenv("PAGEFERRY_FAULT", f"pager.{point}=kill")
        with pytest.raises(RestoreError, match="cannot start the pager: it exited"):
            await take_over(restored.folder)
        monkeypatch.delenv("PAGEFERRY_FAULT")
        await take_over(restored.folder)
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


async def killed_restore(restored: Restored, image: Path, point: str) -> None:
    """Restore the guest with a command that is killed at a fault point."""
    words = ["-m", "pageferry", "restore", restored.folder.name, str(image), "--detach", "--", *restored.command]
    with Program(*words, env=os.environ | {"PAGEFERRY_FAULT": f"restore.{point}=kill"}) as command:
        assert await asyncio.to_thread(command.wait) == -9


def test_guest_of_a_command_killed_before_it_runs_ends(guest: Make, image: Path, registry: Registry) -> None:
    async def run() -> None:
        await killed_restore(guest("restored"), image, "adopted")
        async with asyncio.timeout(30):
            while "restored" in registry.entries():  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    asyncio.run(run())


@pytest.mark.oldest_qemu
def test_guest_of_a_command_killed_when_it_runs_continues(guest: Make, image: Path, tmp_path: Path) -> None:
    """The pager keeps running without the killed command."""

    async def run() -> None:
        restored = guest("restored")
        await killed_restore(restored, image, "resumed")
        restored.workload = await QemuWorkload.attach("restored")
        await restored.arrived()
        await restored.serial.passes(2)
        await pageferry.checkpoint_async(restored.workload, tmp_path / "again")
        assert ImageFile(tmp_path / "again").verify() == []
        await restored.end()

    asyncio.run(run())


@pytest.mark.parametrize("point", ["serving", "settled", "forgotten", "closed"])
def test_pager_killed_while_serving_can_be_replaced(
    guest: Make, image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: str
) -> None:
    async def run() -> None:
        restored = guest("restored")
        monkeypatch.setenv("PAGEFERRY_FAULT", f"pager.{point}=kill")
        with contextlib.suppress(RestoreError):  # at some fault points, the pager is killed before it replies
            await restored.start(image, eager=True)
        monkeypatch.delenv("PAGEFERRY_FAULT")
        if point in ("serving", "settled"):
            async with asyncio.timeout(60):
                while not await _is_dead(restored):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await take_over(restored.folder)
        else:
            async with asyncio.timeout(60):
                while (restored.folder.path / records.RECORD).exists():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        # Attach only now: without a pager, QEMU itself may wait for a missing page and not reply.
        restored.workload = await QemuWorkload.attach("restored")
        await restored.arrived()
        await pageferry.checkpoint_async(restored.workload, tmp_path / "again")
        assert ImageFile(tmp_path / "again").verify() == []
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


async def _is_dead(restored: Restored) -> bool:
    try:
        await restored.status()
    except RestoreError:
        return True
    return False


def test_image_replaced_during_a_restore_is_not_read(
    guest: Make, parts: GuestParts, image: Path, tmp_path: Path
) -> None:
    """The pager reads the file that the restore opened. The next pager refuses the file that replaced this file."""
    other = image_of_a_guest(parts, tmp_path)
    path = Path(shutil.copy(image, tmp_path / "used"))

    def replace(event: Event) -> None:
        if isinstance(event, RunningEvent):
            path.rename(tmp_path / "moved")
            other.rename(path)

    async def run() -> None:
        restored = guest("restored")
        restored.workload, _ = await restore_guest("restored", path, restored.command, prefetch=False, listener=replace)
        await restored.serial.passes(2)
        await restored.kill_pager()
        with pytest.raises(RestoreError, match="the restore was started with id"):
            await take_over(restored.folder)
        await take_over(restored.folder, tmp_path / "moved")
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


def test_guest_waits_while_its_pager_is_dead(guest: Make, image: Path) -> None:
    async def run() -> None:
        restored = guest("restored")
        await restored.start(image, prefetch=False)
        await restored.kill_pager()
        await restored.serial.standstill()
        await take_over(restored.folder)
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


async def paused_over_a_damaged_image(restored: Restored, image: Path, bad: Path) -> None:
    """Restore the guest, paused, from `bad`, a copy of `image`. Then overwrite all blocks of the copy."""
    shutil.copy(image, bad)
    await restored.start(bad, prefetch=False, paused=True)
    with bad.open("r+b") as file:
        for offset, length in ImageFile(image).image.blocks:
            file.seek(offset)
            file.write(bytes(length))


async def access_fails(restored: Restored, bad: Path) -> None:
    """Wait until the guest has accessed a damaged block, and the pager has requested a pause."""
    async with asyncio.timeout(30):
        while not (status := await restored.status()) or not status.accessed:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert "storage block" in status.failures[0]
    assert str(bad) in status.failures[0]
    await restored.logged("to continue with an intact copy")


async def paused_by_the_pager(restored: Restored) -> None:
    """Wait until QEMU has responded to the pager's request, and check that the guest is paused."""
    async with asyncio.timeout(30):
        while '"pausing":true' in (restored.folder.path / records.RECORD).read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert not await restored.workload.running()


def test_guest_is_paused_by_a_damaged_image_and_continues_with_a_good_one(
    guest: Make, image: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        restored = guest("restored")
        await paused_over_a_damaged_image(restored, image, tmp_path / "bad")
        resuming = asyncio.create_task(restored.run())  # QEMU replies after the access if `cont` itself accesses memory
        await access_fails(restored, tmp_path / "bad")
        await take_over(restored.folder, image)
        await resuming
        await paused_by_the_pager(restored)
        await restored.run()
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


def test_guest_that_cannot_be_paused_at_once_is_paused_after_the_takeover(
    guest: Make, image: Path, tmp_path: Path
) -> None:
    """QEMU serves another client, so the request of the pager stays open, and the next pager repeats it."""

    async def run() -> None:
        restored = guest("restored")
        await paused_over_a_damaged_image(restored, image, tmp_path / "bad")
        async with await Monitor.open(restored.workload.qmp_socket) as monitor:
            resuming = asyncio.create_task(monitor.execute("cont"))
            await access_fails(restored, tmp_path / "bad")
            await restored.logged("pauses when the page is loaded")
            await take_over(restored.folder, image)
            assert '"pausing":true' in (restored.folder.path / records.RECORD).read_text()
            await resuming
        await paused_by_the_pager(restored)
        await restored.run()
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


@pytest.mark.usefixtures("huge_pages")
def test_restore_of_memory_on_hugetlbfs(
    parts: GuestParts, serial: MakeSerial, registry: Registry, tmp_path: Path
) -> None:
    """A fault loads a whole huge page. The saved guest used base pages or transparent huge pages."""

    async def run() -> None:
        here, there = serial("source"), serial("restored")
        small = {"memory": "128M"}
        source = await QemuWorkload.start("source", parts.command(here, checker="ferry.mib=32 ferry.rate=500", **small))
        await here.ready()
        await pageferry.checkpoint_async(source, tmp_path / "image")
        await source.discard()
        command = parts.command(there, **small)
        workload, _ = await restore_guest("restored", tmp_path / "image", command, hugetlb=True)
        assert workload.regions[0].page_size == 2 << 20
        await there.passes(2)
        await workload.discard()

    asyncio.run(run())


def test_three_clones_of_an_image_run_at_the_same_time(guest: Make, image: Path) -> None:
    async def run() -> None:
        clones = [guest(f"clone{number}") for number in range(3)]
        await asyncio.gather(*(clone.start(image) for clone in clones))
        for clone in clones:
            await clone.serial.passes(2, timeout=100)
            await clone.end()

    asyncio.run(run())


def test_checkpoint_during_a_restore_is_complete(guest: Make, image: Path, tmp_path: Path) -> None:
    async def run() -> None:
        first, second = guest("first"), guest("second")
        await first.start(image, prefetch=False)
        await pageferry.checkpoint_async(first.workload, tmp_path / "again")
        await first.serial.passes(1)
        assert ImageFile(tmp_path / "again").verify() == []
        await second.start(tmp_path / "again")
        await second.serial.passes(2)
        for guest_ in (first, second):
            assert guest_.serial.bad == []
            await guest_.end()

    asyncio.run(run())


def test_balloon_discards_pages_during_a_restore(guest: Make, image: Path) -> None:
    async def run() -> None:
        restored = guest("restored")
        await restored.start(image, prefetch=False)
        async with restored.workload._control.session() as monitor:
            await monitor.execute("balloon", value=160 << 20)
            await restored.serial.ticks(5)
            await monitor.execute("balloon", value=256 << 20)
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


async def peek(name: str, page: int) -> bytes:
    """Read a page of a guest with `pageferry peek`."""
    call = "import sys; from pageferry.cli.main import main; sys.exit(main())"
    words = [sys.executable, "-c", call, "peek", name, hex(page * 4096), "4K", "--raw"]
    command = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    out, _ = await command.communicate()
    assert command.returncode == 0
    return out


def test_peek_returns_the_contents_of_deferred_pages(guest: Make, image: Path) -> None:
    async def run() -> None:
        restored = guest("restored")
        await restored.start(image, prefetch=False)
        # The pages of the guest kernel's text do not change.
        saved = ImageFile(image)
        for page in range(6000, 8000, 250):
            assert await peek("restored", page) == saved.read(page, 1)
        await restored.end()

    asyncio.run(run())


def test_working_set_is_recorded_and_read_first(guest: Make, image: Path, tmp_path: Path) -> None:
    async def run() -> None:
        own = tmp_path / "own"
        shutil.copy(image, own)
        restored = guest("restored")
        await restored.start(own)
        await restored.arrived()
        await restored.end()
        assert own.with_name("own.ws").stat().st_size > 10
        again = guest("again")
        await again.start(own)
        await again.arrived()
        await again.serial.passes(1)
        await again.end()

    asyncio.run(run())


def test_restore_into_mismatched_memory_is_refused_without_leftovers(
    guest: Make, image: Path, parts: GuestParts, serial: MakeSerial, registry: Registry
) -> None:
    async def run() -> None:
        smaller = parts.command(serial("smaller"), *OPTIONS, memory="128M")
        with pytest.raises(RestoreError, match="the guest has"):
            await restore_guest("smaller", image, smaller)
        with pytest.raises(UsageError, match="as an arena"):
            pageferry.restore(image)
        assert registry.entries() == {}

    asyncio.run(run())


def test_guests_are_restored_and_cloned_from_a_store(
    guest: Make, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/store/web"
    pageferry.push_image(image, url)
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))

    async def run() -> None:
        for name, words in (("restored", ["restore", "restored"]), ("copy-1", ["clone", "--name", "copy-{n}"])):
            started = guest(name)
            await pageferry_ends(*words, url, "--detach", "--", *started.command)
            await started.serial.passes(2)
            entry = Registry().lookup(name)
            await pageferry_ends("stop", name)
            await processes.wait_for_end(entry.pid, entry.started)

    asyncio.run(run())
    assert [one.url for one in pageferry.list_cache().images] == [url]


async def pageferry_ends(*words: str) -> None:
    """Run a command of pageferry, which must succeed."""
    assert await (await asyncio.create_subprocess_exec(sys.executable, "-m", "pageferry", *words)).wait() == 0
