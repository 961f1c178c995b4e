"""Tests of restores by three kinds of user.

Memory is loaded on demand if the kernel lets the user create a userfaultfd, otherwise before the guest runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.machines import GuestParts
from tests.guest.restored import OPTIONS, image_of_a_guest
from tests.guest.serial import Serial
from tests.kernel import users

pytestmark = pytest.mark.usefixtures("root")

DEVICE = Path("/dev/userfaultfd")


@pytest.fixture(scope="module")
def image(newest_parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of an image of a running guest."""
    return image_of_a_guest(newest_parts, tmp_path_factory.mktemp("image"))


@pytest.fixture
def folder(image: Path) -> Iterator[Path]:
    """Yield a directory that every user may write to, with a copy of the image."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("every user may create a userfaultfd on this host")
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o777)
        copy = shutil.copy(image, Path(made) / "image")
        os.chmod(copy, 0o644)
        yield Path(made)


@pytest.fixture
def device() -> Iterator[None]:
    """Make /dev/userfaultfd accessible to every user during a test."""
    if not DEVICE.exists():
        pytest.skip(f"no {DEVICE}")
    before = DEVICE.stat().st_mode
    DEVICE.chmod(0o666)
    try:
        yield
    finally:
        DEVICE.chmod(before)


def restored(kind: str, folder: Path, parts: GuestParts) -> list[dict[str, Any]]:
    """Restore a guest as this kind of user, and stop the guest after it has verified its memory.

    Return the events of the restore.
    """
    serial = Serial(folder / "serial")
    command = parts.command(serial, *OPTIONS)
    if kind == "user":  # otherwise, QEMU's seccomp filter would be the reason for the eager restore
        command[command.index("-sandbox") + 1] = "off"
    restore = ("restore", "web", str(folder / "image"), "--detach", "--output", "json", "--", *command)
    done = users.run(kind, folder, "-m", "pageferry", *restore)
    assert done.returncode == 0, done.stderr
    try:
        asyncio.run(serial.passes(2))
    finally:
        ended = users.run(kind, folder, "-m", "pageferry", "stop", "web", "--kill")
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", users.KINDS)
def test_each_kind_of_user_can_restore_a_guest(newest_parts: GuestParts, folder: Path, kind: str) -> None:
    events = restored(kind, folder, newest_parts)
    result = events[-1]
    assert result["type"] == "restore"
    if kind == "root":
        assert result["eager-reason"] is None
        assert result["deferred"] > 0
    else:
        assert {"restore-eager", "restore-progress", "running"} <= {event["type"] for event in events}
        assert isinstance(result["eager-reason"], str)
        assert (result["status"], result["deferred"]) == ("completed", 0)
    if kind == "user":
        assert "/dev/userfaultfd" in str(result["eager-reason"])


def test_restore_by_an_ordinary_user_with_the_device_is_lazy(
    newest_parts: GuestParts, folder: Path, device: None
) -> None:
    """QEMU itself opens the device, by injected system calls: the userfaultfd must belong to its address space."""
    result = restored("user", folder, newest_parts)[-1]
    assert result["eager-reason"] is None
    assert result["deferred"] > 0
