"""Root, an ordinary user and a container user: each can do what its privileges allow. Errors name an alternative."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import users
from tests.kernel.images import Maker
from tests.kernel.moving import address_of, ends_intact, ledger, migrating, receiver

pytestmark = pytest.mark.usefixtures("root")

DEVICE = Path("/dev/userfaultfd")
SWITCH = Path("/proc/sys/vm/unprivileged_userfaultfd")
LAZY = {"root": True, "user": False, "sandbox": False}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder that every user may write to, unlike pytest's folders, which belong to root.

    Skip the test if every user may create a userfaultfd.
    """
    if not SWITCH.exists() or SWITCH.read_text().strip() != "0":
        pytest.skip("every user may create a userfaultfd on this host")
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o777)
        yield Path(made)


@pytest.fixture
def device() -> Iterator[None]:
    """Make /dev/userfaultfd accessible to every user during a test, as an administrator's udev rule would."""
    if not DEVICE.exists():
        pytest.skip(f"no {DEVICE}")
    before = DEVICE.stat().st_mode
    DEVICE.chmod(0o666)
    try:
        yield
    finally:
        DEVICE.chmod(before)


def checked(kind: str, folder: Path) -> dict[str, Any]:
    """Return the JSON report of `pageferry check` for a kind of user."""
    done = users.run(kind, folder, "-m", "pageferry", "check", "--output", "json")
    assert done.returncode in (0, 3), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def restored(kind: str, folder: Path, image: Path) -> dict[str, Any]:
    done = users.run(kind, folder, "-m", "tests.kernel.restoring_user", str(image), str(folder / "out"))
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said | {"stderr": done.stderr}


def image(folder: Path) -> tuple[Path, str]:
    """Write an image that every user may read. Return its path, and the hash of its memory."""
    made = Maker(2048)
    path = made.write(folder / "image")
    path.chmod(0o644)
    return path, hashlib.sha256(made.contents.tobytes()).hexdigest()


@pytest.mark.parametrize("kind", users.KINDS)
def test_check_reports_how_a_restore_and_a_checkpoint_work(folder: Path, kind: str) -> None:
    found = checked(kind, folder)
    systems = {one["system"]: one for one in found["systems"]}
    features = {one["name"]: one for one in found["features"]}
    for system in ("S4", "S8", "S10"):
        assert systems[system]["status"] == ("ok" if LAZY[kind] else "fallback")
    if not LAZY[kind]:
        assert "before the workload runs" in systems["S10"]["mechanism"]
        assert "--mode stop" in systems["S4"]["mechanism"]
        assert "/dev/userfaultfd" in features["userfaultfd-kernel-faults"]["remedy"]
    assert features["userfaultfd"]["available"] == (kind != "sandbox")


@pytest.mark.parametrize("kind", users.KINDS)
def test_restored_arena_is_readable_by_system_calls(folder: Path, kind: str) -> None:
    path, expected = image(folder)
    said = restored(kind, folder, path)
    assert said["hash"] == expected
    assert (said["deferred"] > 0) == LAZY[kind]
    assert ("loading all" in said["stderr"]) == (not LAZY[kind])


def test_eager_restore_reports_reason_and_progress(folder: Path) -> None:
    path, _ = image(folder)
    done = users.run("sandbox", folder, "-m", "tests.kernel.restoring_user", str(path), str(folder / "out"), "listen")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["events"] == ["EagerEvent", "ProgressEvent"]
    assert "/dev/userfaultfd" in done.stderr


def test_eager_restore_of_a_damaged_image_is_an_error(folder: Path) -> None:
    path, _ = image(folder)
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))
    done = users.run("user", folder, "-m", "tests.kernel.restoring_user", str(path), str(folder / "out"))
    assert "ImageError" in done.stderr
    assert "cannot read page" in done.stderr


@pytest.mark.parametrize("kind", users.KINDS)
def test_checkpoint_names_the_mode_that_works(folder: Path, kind: str) -> None:
    done = users.run(kind, folder, "-m", "tests.kernel.saving_user", str(folder))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["stop"] == "completed"
    assert (folder / "lazy").exists() == LAZY[kind]
    if not LAZY[kind]:
        assert "--mode stop" in said["error"]
        assert 'mode="stop"' in said["error"]


def test_userfaultfd_device_makes_restore_of_ordinary_user_lazy(folder: Path, device: None) -> None:
    path, expected = image(folder)
    said = restored("user", folder, path)
    assert said["hash"] == expected
    assert said["deferred"] > 0
    found = checked("user", folder)
    features = {one["name"]: one for one in found["features"]}
    assert "by /dev/userfaultfd" in features["userfaultfd-kernel-faults"]["detail"]
    assert {one["system"]: one["status"] for one in found["systems"]}["S10"] == "ok"


def test_postcopy_is_refused_before_the_pause_by_a_destination_that_cannot_handle_faults(folder: Path) -> None:
    here, there = users.host("user", folder), users.host("user", folder / "there")
    users.python()  # skips the test if no Python is usable
    with ledger("here", here) as source, receiver("there", host=there) as receiving:
        with migrating("here", address_of(receiving), "--mode", "hybrid", host=here, stderr=subprocess.PIPE) as moving:
            events, said = moving.process.communicate(timeout=60)
            refusal = said.decode()
            assert moving.process.returncode == 21, refusal
        assert b"round" not in events
        assert "cannot use post-copy to this destination" in refusal
        assert "--mode precopy" in refusal
        ends_intact(source)
