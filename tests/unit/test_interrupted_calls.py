"""Ctrl-C ends synchronous calls within a second, even while a call of the engine does not return."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pageferry
from pageferry.checkpoints import restore_arena
from pageferry.images.image import ImageFile
from pageferry.workloads.arena import arena as arenas

CALL = 3.0
"""Duration of a call that no signal ends, seconds."""


def stubborn(*_: object) -> None:
    """Wait for a few seconds, like a call of the engine, which no exception of a signal handler interrupts."""
    end = time.monotonic() + CALL
    while (left := end - time.monotonic()) > 0:
        try:
            time.sleep(left)
        except KeyboardInterrupt:
            continue


def interrupted(call: Callable[[], object]) -> float:
    """Make a call, interrupt it after 0.2 s, and return the time from the interrupt to its end, seconds."""
    times: list[float] = []

    def interrupt() -> None:
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.2, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        call()
    return time.monotonic() - times[0]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pageferry.checkpoint(pageferry.Arena(1 << 20), tmp_path / "image")
    return tmp_path / "image"


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("verify", pageferry.verify_image),
        ("differences", lambda path: pageferry.compare_images(path, path)),
        ("flatten", lambda path: pageferry.flatten_image(path, f"{path}.flat")),
        ("__init__", pageferry.image_info),
        ("__init__", pageferry.restore),
        ("__init__", pageferry.load),
        ("__init__", pageferry.open_buffers),
    ],
)
def test_interrupt_ends_a_call_that_reads_an_image(
    method: str, call: Callable[[Path], object], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, method, stubborn)
    assert interrupted(lambda: call(image)) < 1


@pytest.mark.parametrize("method", ["load", "collapse", "fileno", "resize", "ensure"])
def test_interrupt_ends_a_call_that_loads_contents(method: str, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = pageferry.restore(image, capacity="2MiB")
    for module in (arenas, restore_arena):
        for name in ("load_all", "load_pages"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stubborn)
    arguments = {"resize": ("2MiB",), "ensure": (0, 4096)}.get(method, ())
    assert interrupted(lambda: getattr(arena, method)(*arguments)) < 1
    assert arena.status == "running"


def test_interrupted_checkpoint_leaves_the_arena_running_and_no_image(tmp_path: Path) -> None:
    arena = pageferry.Arena(32 << 20)
    memoryview(arena)[:] = os.urandom(32 << 20)
    call = lambda: pageferry.checkpoint(arena, tmp_path / "image", bandwidth="1MiB", codec="none")  # noqa: E731
    assert interrupted(call) < 1
    assert arena.status == "running"
    assert list(tmp_path.iterdir()) == []


def test_interrupted_dump_leaves_no_image(tmp_path: Path) -> None:
    contents = np.random.default_rng(1).random(32 << 20)
    assert interrupted(lambda: pageferry.dump(contents, tmp_path / "image", codec="zstd")) < 1
    assert list(tmp_path.iterdir()) == []
