"""Tests of starts of clones that fail: every guest is ended, with its overlays."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pageferry.checkpoints import clone
from pageferry.checkpoints.clone_options import CloneOptions
from pageferry.errors import RestoreError, UsageError
from pageferry.events import ignore


class Restore:
    """Restore of a guest. That of `failing` fails after ten turns of the event loop; that of `waiting` never ends."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.discarded = 0

    async def run(self, _: Sequence[str]) -> tuple[Any, None]:
        if self.name == "failing":
            for _turn in range(10):
                await asyncio.sleep(0)
            raise RestoreError("the pager has exited")
        if self.name == "waiting":
            await asyncio.Event().wait()
        return SimpleNamespace(name=self.name, generation_id=None), None

    async def discard(self) -> None:
        self.discarded += 1
        if self.name == "failing":
            raise OSError("cannot remove the overlay")


class Options(CloneOptions):
    """Options of three guests."""

    @property
    def names(self) -> list[str]:
        return ["running", "failing", "waiting"]


@pytest.fixture
def restores(monkeypatch: pytest.MonkeyPatch) -> list[Restore]:
    """Return the list of the restores that the test starts."""
    made: list[Restore] = []

    def open_restore(name: str, *_: Any, **__: Any) -> Restore:
        made.append(Restore(name))
        return made[-1]

    monkeypatch.setattr(clone, "open_restore", open_restore)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    return made


def start(*arguments: str) -> asyncio.Future[Any]:
    options = Options(count=3, memory="own")
    return asyncio.ensure_future(clone.start_clones("image", ["qemu", *arguments], options, ignore))


def test_restore_that_fails_after_its_guest_runs_ends_all_guests(restores: list[Restore]) -> None:
    async def run() -> None:
        with pytest.raises(RestoreError, match="the pager has exited"):
            await start()
        assert [(one.name, one.discarded) for one in restores] == [("running", 1), ("failing", 1), ("waiting", 1)]

    asyncio.run(run())


def test_cancelled_start_ends_all_guests(restores: list[Restore]) -> None:
    async def run() -> None:
        starting = start()
        for _ in range(5):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert [one.discarded for one in restores] == [1, 1, 1]

    asyncio.run(run())


def test_address_of_two_guests_is_refused_before_a_start(restores: list[Restore]) -> None:
    async def run() -> None:
        with pytest.raises(UsageError, match="running and failing would both listen on tcp::1234"):
            await start("-s")

    asyncio.run(run())
    assert restores == []
