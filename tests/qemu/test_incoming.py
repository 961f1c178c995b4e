"""Tests of guests that wait for a device state: mismatched states are refused, and abandoned guests are killed."""

from __future__ import annotations

import asyncio
import os

import pytest

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.registry import Registry
from pageferry.workloads.qemu.device_state import SavedState
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts

pytestmark = pytest.mark.oldest_qemu

BALLOON = ("-device", "virtio-balloon-pci")


def test_state_of_a_different_machine_is_refused(parts: GuestParts, registry: Registry) -> None:
    """Check that pageferry or QEMU refuses each mismatch, and that no process of the destination remains."""

    async def scenario() -> None:
        # The guest has never run: otherwise the test would have to copy the guest's memory, too.
        source = await QemuWorkload.start("source", parts.bare("-m", "64M", "-S", *BALLOON))
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


def test_beginning_of_a_state_is_loaded_ahead(parts: GuestParts, registry: Registry) -> None:
    """The chunks of a state may end at any byte. The header is checked before QEMU receives the stream."""

    async def scenario() -> None:
        pieces: list[bytes] = []

        async def sink(piece: bytes) -> None:
            pieces.append(piece)

        source = await QemuWorkload.start("source", parts.bare("-m", "64M", "-vga", "std"))
        await source.pause_to_save(sink)
        state = await source.save_state()
        memory = os.pread(source.regions[0].fd, 64 << 20, 0)
        await source.resume()
        await source.discard()
        early = b"".join(pieces)

        other = await QemuWorkload.start("other", parts.bare("-m", "64M", "-machine", "q35"), incoming=True)
        with pytest.raises(WorkloadError, match="cannot load the state of a pc"):
            await other.load_ahead(early)
        await other.discard()

        target = await QemuWorkload.start("target", parts.bare("-m", "64M", "-vga", "std"), incoming=True)
        for piece in (early[:3], early[3:50], early[50:1000], early[1000:]):
            await target.load_ahead(piece)
        os.pwrite(target.regions[0].fd, memory, 0)
        await target.load_state(state)
        await target.resume()
        assert await target.running()
        await target.discard()

    asyncio.run(scenario())


def test_guest_without_state_ends_when_its_receiver_closes(parts: GuestParts, registry: Registry) -> None:
    """After the receiver has exited, the guardian kills the guest that waits for its state."""

    async def scenario() -> None:
        waiting = await QemuWorkload.start("waiting", parts.bare("-m", "64M"), incoming=True)
        waiting.close()
        async with asyncio.timeout(30):
            await waiting.ended()
        await waiting.forget()

    asyncio.run(scenario())
