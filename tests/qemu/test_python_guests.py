"""Guests that a Python program starts, saves and restores by their names, as the commands do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.options import Memory
from pageferry.errors import ImageError, NameInUse, NoSuchWorkload, UsageError
from pageferry.host.registry import Registry
from tests.guest.machines import GuestParts
from tests.guest.restored import OPTIONS
from tests.guest.serial import Serial


@pytest.mark.parametrize("memory", ["own", "shared"])
def test_guest_is_started_saved_and_restored_by_name(
    parts: GuestParts, serial: Callable[[str], Serial], registry: Registry, tmp_path: Path, memory: Memory
) -> None:
    first, second = serial("first"), serial("second")
    assert pageferry.run_guest("first", parts.command(first, *OPTIONS)).name == "first"
    with pytest.raises(NameInUse):
        pageferry.run_guest("first", parts.command(first, *OPTIONS))
    asyncio.run(first.ticks(2))
    events: list[object] = []
    saved = pageferry.checkpoint_guest("first", tmp_path / "image", listener=events.append)
    assert saved.downtime > 0
    assert events
    result = pageferry.restore_guest("second", tmp_path / "image", parts.command(second, *OPTIONS), memory=memory)
    assert (result.workload, result.status) == ("second", "active")
    asyncio.run(second.passes(1))
    for name in ("first", "second"):
        pageferry.stop(name)
    assert registry.entries() == {}


def test_invalid_arguments_leave_no_guest(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an empty list"):
        pageferry.run_guest("guest", [])
    with pytest.raises(UsageError, match="always detached"):
        pageferry.restore_guest("guest", tmp_path / "image", ["qemu-system-x86_64"], detach=False)  # type: ignore[call-arg]
    with pytest.raises(ImageError):
        pageferry.restore_guest("guest", tmp_path / "image", ["qemu-system-x86_64", "-m", "64M"])
    with pytest.raises(NoSuchWorkload):
        pageferry.checkpoint_guest("guest", tmp_path / "image")
    assert registry.entries() == {}
