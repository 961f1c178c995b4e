"""A guest moves to a second QEMU by its device state and a copy of its memory, on several kinds of machine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.registry import Registry
from pageferry.workloads.qemu import QemuWorkload
from pageferry.workloads.qemu_state import SavedState
from pageferry.workloads.qmp import Monitor
from tests.guest.machines import GuestParts, copy_memory
from tests.guest.serial import Serial

MakeSerial = Callable[[str], Serial]
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")

BALLOON = ("-device", "virtio-balloon-pci")
Q35 = ("-machine", "q35", "-smp", "2", *BALLOON, "-drive", "file={disk},format=raw,if=virtio")


async def move(
    parts: GuestParts, serial: MakeSerial, *options: str, memory: str = "256M", hugetlb: bool = False
) -> tuple[int, int]:
    """Move a guest, and see that it goes on there with all of its memory; bytes allocated at source and destination."""
    here, there = serial("source"), serial("destination")
    source = await QemuWorkload.start("source", parts.command(here, *options, memory=memory), hugetlb=hugetlb)
    await here.ready()
    await here.ticks(1)
    destination = await QemuWorkload.start(
        "destination", parts.command(there, *options, memory=memory), incoming=True, hugetlb=hugetlb
    )
    await source.pause()
    state = await source.save_state()
    copy_memory(source.regions, destination.regions)
    await destination.load_state(state)
    assert not await destination.running()
    allocated = [sum(os.fstat(region.fd).st_blocks * 512 for region in one.regions) for one in (source, destination)]
    await destination.resume()
    await source.discard()
    assert await destination.running()
    await there.passes(2)
    assert here.bad == there.bad == []
    await destination.discard()
    return allocated[0], allocated[1]


@pytest.mark.parametrize("options", [(), Q35], ids=["pc", "q35"])
def test_moves(
    parts: GuestParts, serial: MakeSerial, registry: Registry, options: tuple[str, ...], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    asyncio.run(move(parts, serial, *(option.format(disk=disk) for option in options)))


def test_memory_above_the_pci_hole_is_one_region(parts: GuestParts, serial: MakeSerial, registry: Registry) -> None:
    """5 GiB are one file in two guest-physical ranges; what the guest never touches is not allocated."""
    allocated = asyncio.run(move(parts, serial, memory="5G"))
    assert max(allocated) < 1 << 30


@pytest.fixture
def huge_pages(root: None) -> Iterator[None]:
    """Enough for two guests of 256 MiB; the kernel may find fewer."""
    before = HUGE_PAGES.read_text()
    HUGE_PAGES.write_text("256")
    try:
        if int(HUGE_PAGES.read_text()) < 256:
            pytest.skip("the kernel finds no 256 huge pages")
        yield
    finally:
        HUGE_PAGES.write_text(before)


@pytest.mark.usefixtures("huge_pages")
def test_hugetlb(parts: GuestParts, serial: MakeSerial, registry: Registry) -> None:
    asyncio.run(move(parts, serial, hugetlb=True))


def test_balloon(parts: GuestParts, serial: MakeSerial, registry: Registry) -> None:
    """A balloon gives memory back through the nameless file, and does so at the destination too."""

    async def inflate(workload: QemuWorkload, size: int) -> None:
        async with await Monitor.open(str(registry.path / workload.name / "qmp.sock")) as monitor:
            await monitor.execute("balloon", value=size)
            async with asyncio.timeout(30):
                while (await monitor.execute("query-balloon"))["actual"] != size:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

    async def scenario() -> None:
        here, there = serial("source"), serial("destination")
        source = await QemuWorkload.start("source", parts.command(here, *BALLOON))
        await here.ready()
        await inflate(source, 192 << 20)
        destination = await QemuWorkload.start("destination", parts.command(there, *BALLOON), incoming=True)
        await source.pause()
        state = await source.save_state()
        copy_memory(source.regions, destination.regions)
        await destination.load_state(state)
        await destination.resume()
        await source.discard()
        await inflate(destination, 176 << 20)
        await inflate(destination, 256 << 20)
        await there.passes(2)
        assert here.bad == there.bad == []
        await destination.discard()

    asyncio.run(scenario())


def test_state_that_does_not_fit_is_refused(parts: GuestParts, serial: MakeSerial, registry: Registry) -> None:
    """By us where we can tell, else by QEMU, in its words; and nothing is left of the destination."""

    async def scenario() -> None:
        source = await QemuWorkload.start("source", parts.bare("-m", "64M", *BALLOON))
        await source.pause()
        state = await source.save_state()
        machine = source.identity.details["machine"]
        await source.resume()
        await source.discard()

        other = await QemuWorkload.start("other", parts.bare("-m", "64M", "-machine", "q35"), incoming=True)
        with pytest.raises(WorkloadError, match=f"start it with -machine {machine}"):
            await other.load_state(state)
        with pytest.raises(WorkloadError, match="was not saved by pageferry"):
            await other.load_state(b"\x80\x00\x01")
        await other.discard()

        lacking = await QemuWorkload.start("lacking", parts.bare("-m", "64M"), incoming=True)
        with pytest.raises(WorkloadError, match="virtio-balloon"):
            await lacking.load_state(state)
        await lacking.discard()

        short = await QemuWorkload.start("short", parts.bare("-m", "64M", *BALLOON), incoming=True)
        saved = SavedState.decode(state)
        cut = SavedState(machine=saved.machine, was_running=True, stream=saved.stream[: len(saved.stream) // 2])
        with pytest.raises((WorkloadError, WorkloadDied)):
            await short.load_state(cut.encode())
        await short.discard()

    asyncio.run(scenario())


def test_destination_that_is_let_go_ends(parts: GuestParts, registry: Registry) -> None:
    """A guest that waits for its state is worth nothing once its receiver is gone: the guardian ends it."""

    async def scenario() -> None:
        waiting = await QemuWorkload.start("waiting", parts.bare("-m", "64M"), incoming=True)
        waiting.close()
        async with asyncio.timeout(30):
            await waiting.ended()
        await waiting.forget()

    asyncio.run(scenario())
