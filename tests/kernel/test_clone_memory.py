"""Memory of clones, saved by another process: private pages only, with the image of the base as the parent."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pageferry._engine import Image, ImageChain, ProcessRange, Saver
from pageferry.checkpoints.rounds import Rounds
from pageferry.host.smaps import smaps
from tests.kernel.test_base import PAGES, UNIT, Base

PAGE = 4096
DATA, ZEROS = 7, 2 * UNIT
"""Index of a page with contents, and index of the first page of a unit of zeros."""

pytestmark = pytest.mark.usefixtures("root")


class Clone:
    """Clone that has accessed all of its memory, and does not run."""

    def __init__(self, base: Base, rounds: int = 300) -> None:
        base.clone(1)
        self.program, self.userfault, self.segment, _ = base.clones[-1]
        self.base = base
        self.pid = self.program.process.pid
        self.program.say(str(rounds))
        assert self.program.json()["writes"] > 0
        self.range = ProcessRange(self.segment.space, self.segment.address, PAGES * PAGE, private=True)
        self.memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR)

    def write(self, page: int, contents: bytes) -> None:
        """Write to a page, as the process would."""
        os.pwrite(self.memory, contents, self.segment.address + page * PAGE)

    @property
    def contents(self) -> bytes:
        """All memory."""
        return b"".join(self.read(first, min(UNIT, PAGES - first)) for first in range(0, PAGES, UNIT))

    def read(self, first: int, count: int) -> bytes:
        """Read pages through the page tables of the process."""
        return os.pread(self.memory, count * PAGE, self.segment.address + first * PAGE)

    @property
    def mapped_as_huge_pages(self) -> int:
        """Memory of the base that is mapped as huge pages, bytes."""
        found = [one for one in smaps(self.pid) if one.mapping.address == self.segment.address]
        return sum(one.counts["ShmemPmdMapped"] for one in found)

    def saver(self, file: int, *, traced: bool, bandwidth: int = 0) -> Saver:
        """Return a saver of the private pages."""
        return Saver(
            [(self.range, PAGE)],
            [self.segment] if traced else [],
            file,
            secrets.token_bytes(16),
            parent=self.base.image.chain,
            traces=("private", {self.pid: self.userfault}) if traced else None,
            bandwidth=bandwidth,
        )

    def image(self, path: Path) -> ImageChain:
        """Open the image that was written."""
        file = os.open(path, os.O_RDONLY)
        try:
            return ImageChain([Image(file), *(link.image for link in self.base.image.links)])
        finally:
            os.close(file)


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    """Yield a clone of a complete base."""
    base = Base(tmp_path)
    try:
        one = Clone(base)
        yield one
        os.close(one.memory)
    finally:
        base.close()


def finished(saver: Saver) -> None:
    """Complete an image after its snapshot point."""
    saver.sweep()
    while not saver.wait(1.0):
        pass
    saver.finish([])
    saver.close()


def test_only_private_pages_are_stored_and_contents_are_those_of_the_process(clone: Clone, tmp_path: Path) -> None:
    same = clone.base.contents[DATA + 1].tobytes()
    clone.write(DATA, bytes(PAGE))
    clone.write(DATA + 1, same)
    clone.write(ZEROS, b"written")
    expected = clone.contents
    differing = np.frombuffer(expected, np.uint64).reshape(PAGES, -1) != clone.base.contents[:PAGES]
    private = sum(end - start for start, end in clone.range.data_ranges()) // PAGE
    assert private > UNIT > int(differing.any(axis=1).sum())
    with (tmp_path / "child").open("w+b") as file:
        saver = clone.saver(file.fileno(), traced=False)
        assert saver.pages == "swept"
        saver.begin()
        finished(saver)
        counters = saver.counters
    image = clone.image(tmp_path / "child")
    assert image.read(0, PAGES) == expected
    # Pages of zeros that the pager has mapped are private, and are neither read nor stored.
    assert counters.data <= int(differing.any(axis=1).sum())
    assert counters.pages < UNIT
    assert counters.in_parent > 2 * UNIT


def test_overlay_replaces_private_pages_only(clone: Clone) -> None:
    expected = clone.contents
    base = clone.base.contents[:PAGES].tobytes()
    assert clone.range.overlay(0, base) == expected
    part = slice(5 * PAGE, 900 * PAGE)
    assert clone.range.overlay(5 * PAGE, base[part]) == expected[part]
    for start, length in ((1, PAGE), (0, PAGE - 1), ((PAGES - 1) * PAGE, 2 * PAGE)):
        with pytest.raises(ValueError, match="whole pages"):
            clone.range.overlay(start, bytes(length))


class Writer:
    """Thread that writes to random pages of a clone until it is stopped."""

    def __init__(self, clone: Clone) -> None:
        self._clone = clone
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        random = np.random.default_rng(3)
        while not self._stop.wait(0.0002):
            self._clone.write(int(random.integers(0, PAGES)), secrets.token_bytes(64))

    def stop(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join()


def test_private_pages_are_saved_in_rounds_while_they_are_written(clone: Clone, tmp_path: Path) -> None:
    # The second checkpoint finds the protections of the first one, which the kernel has not removed.
    for name in ("first", "second"):
        writer = Writer(clone)
        with (tmp_path / name).open("w+b") as file:
            saver = clone.saver(file.fileno(), traced=True)
            assert saver.pages == "all"
            rounds = Rounds(max_remaining=64)
            rounds.run(saver, [PAGES], lambda: None)
            writer.stop()
            expected = clone.contents
            saver.begin()
            writer = Writer(clone)
            finished(saver)
            writer.stop()
            assert not saver.leaves_traces
        assert clone.image(tmp_path / name).read(0, PAGES) == expected
        assert clone.contents != expected
    assert clone.base.pager.holes == 0


def test_bandwidth_limits_rounds_of_private_pages(clone: Clone, tmp_path: Path) -> None:
    private = sum(end - start for start, end in clone.range.data_ranges())
    with (tmp_path / "child").open("w+b") as file:
        saver = clone.saver(file.fileno(), traced=True, bandwidth=private)
        rounds = Rounds(max_remaining=64)
        rounds.run(saver, [PAGES], lambda: None)
        assert 0.9 < rounds.seconds < 10
        saver.begin()
        finished(saver)
    assert clone.image(tmp_path / "child").read(0, PAGES) == clone.contents


def test_trace_of_private_pages_keeps_the_registration_for_missing_pages(tmp_path: Path) -> None:
    base = Base(tmp_path)
    try:
        base.clone(1)
        program, userfault, segment, number = base.clones[0]
        memory = ProcessRange(segment.space, segment.address, PAGES * PAGE, private=True)
        with (tmp_path / "child").open("w+b") as file:
            saver = Saver(
                [(memory, PAGE)],
                [segment],
                file.fileno(),
                secrets.token_bytes(16),
                parent=base.image.chain,
                traces=("private", {program.process.pid: userfault}),
            )
            Rounds(max_remaining=64).run(saver, [PAGES], lambda: None)
            saver.begin()
            finished(saver)
            assert saver.counters.pages == 0
        program.say("300")
        assert program.json()["bad"] == 0
        assert base.pager.counters(number).missed > 0
        assert base.pager.holes == 0
    finally:
        base.close()


def test_trace_leaves_pages_of_the_base_mapped_as_huge_pages(tmp_path: Path) -> None:
    base = Base(tmp_path)
    try:
        clone = Clone(base, rounds=1)
        before = clone.mapped_as_huge_pages
        assert before > 0
        with (tmp_path / "child").open("w+b") as file:
            saver = clone.saver(file.fileno(), traced=True)
            Rounds(max_remaining=0).run(saver, [PAGES], lambda: None)
            saver.begin()
            finished(saver)
        assert clone.mapped_as_huge_pages == before
        os.close(clone.memory)
    finally:
        base.close()


def test_private_memory_requires_a_parent(clone: Clone, tmp_path: Path) -> None:
    with (tmp_path / "child").open("w+b") as file, pytest.raises(OSError, match="requires a parent"):
        Saver([(clone.range, PAGE)], [], file.fileno(), secrets.token_bytes(16))
