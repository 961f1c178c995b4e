"""Tests of the steps that all modes of saving disks share."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pageferry.workloads.qemu.disk_saving import DiskSaving, ImageOfGuest, SavingGuest


class Failing(DiskSaving):
    """Saving whose steps cannot be undone."""

    async def _undo(self) -> None:
        raise OSError(5, "Input/output error")


def test_failed_undo_does_not_keep_the_guest_from_being_released(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    released = []

    async def release() -> None:
        released.append(True)

    unused = cast("Any", SimpleNamespace())
    guest = SavingGuest(
        name="web", pid=1, control=unused, storage=unused, qmp_socket="", devices=tuple, release=release
    )
    saving = Failing(guest, ImageOfGuest(path=tmp_path / "image", id="0" * 32))
    with caplog.at_level(logging.WARNING):
        asyncio.run(saving.abandon())
    assert released == [True]
    assert saving.ended
    assert "web: cannot undo a step of the failed checkpoint: [Errno 5] Input/output error" in caplog.text
