"""Base of clones: pages appear as a whole while clones read them, and the next pager takes holes for missing pages."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pageferry._engine import BasePager, MappedSegment, Space
from pageferry.host import memory_file
from pageferry.images.image import ImageFile
from tests.kernel.images import PAGE, PATTERN, ZERO, Maker
from tests.kernel.programs import Program

UNIT = 512
UNITS = 10
PAGES = UNITS * UNIT - 100
LENGTH = BasePager.file_length([PAGES])
READER = str(Path(__file__).with_name("base_reader.py"))

pytestmark = pytest.mark.usefixtures("root")


class Base:
    """File of a base, its image, and the pager."""

    def __init__(self, folder: Path, file: int | None = None) -> None:
        old = Maker(PAGES, seed=7)
        parent = old.write(folder / "parent")
        new = Maker(PAGES, seed=8)
        new.build_on(old, parent)
        for page in range(2 * UNIT, 4 * UNIT):
            new.classes[page], new.inherited[page], new.contents[page] = ZERO, False, 0
        for page in range(5 * UNIT, 6 * UNIT):
            new.classes[page], new.inherited[page], new.contents[page] = PATTERN, False, 1 + page
        self.image = ImageFile(new.write(folder / "image"))
        self.expected = folder / "expected"
        new.contents.tofile(self.expected)
        self.contents = new.contents
        self.file = memory_file.create_ram_file(LENGTH).fd if file is None else file
        self.pager = BasePager(self.image.chain, self.file, [PAGES])
        self._programs = ExitStack()
        self.clones: list[tuple[Program, int, MappedSegment, int]] = []

    def clone(self, seed: int, pager: BasePager | None = None) -> int:
        """Start a clone, which waits for input before it accesses memory. Return the clone's number in the pager."""
        path = f"/proc/{os.getpid()}/fd/{self.file}"
        program = Program(READER, path, str(PAGES * PAGE), str(self.expected), str(seed))
        self._programs.enter_context(program)
        told = program.json()
        space, address, length = Space(program.process.pid), told["address"], PAGES * PAGE
        space.map_private(address, length, told["descriptor"], 0)
        made = space.missing_faults()
        BasePager.register(made.descriptor, address, length)
        segment = MappedSegment(space, address, length)
        number = (pager or self.pager).add(made.descriptor, [segment])
        space.make_writable(address, length)
        self.clones.append((program, made.descriptor, segment, number))
        return number

    def close(self) -> None:
        """Kill the clones, and stop the pager."""
        self._programs.close()
        for _, descriptor, _, _ in self.clones:
            os.close(descriptor)
        self.pager.stop()
        os.close(self.file)


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Base]:
    """Yield an empty base."""
    made = Base(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("fill", ["none", "gentle", "eager"])
def test_random_readers_of_a_base_that_is_filled_see_no_wrong_word(base: Base, fill: str) -> None:
    for seed in (1, 2, 3):
        base.clone(seed)
    for program, *_ in base.clones:
        program.say("4000")
    if fill != "none":
        base.pager.fill([5, 3], fill == "eager")
    for program, *_ in base.clones:
        result = program.json()
        assert result["bad"] == 0
        assert result["reads"] > 0
        assert result["writes"] > 0
    assert base.pager.holes == 0
    counters = [base.pager.counters(number) for *_, number in base.clones]
    loaded = sum(one.missed for one in counters) + base.pager.prefetched
    assert loaded == UNITS - 2
    assert all(one.zeros > 0 for one in counters)
    assert base.pager.failures == []


def test_clone_of_a_filled_base_raises_no_fault_and_writes_stay_private(base: Base) -> None:
    base.pager.fill([], True)
    while base.pager.holes:
        pass
    number = base.clone(1)
    base.clones[0][0].say("100")
    assert base.clones[0][0].json()["bad"] == 0
    counters = base.pager.counters(number)
    assert (counters.missed, counters.faults) == (0, counters.zeros)
    for page in range(0, PAGES, 97):
        assert os.pread(base.file, PAGE, page * PAGE) == base.contents[page].tobytes()


def test_pager_that_takes_over_continues_from_the_holes_of_the_file(base: Base) -> None:
    for seed in (1, 2):
        base.clone(seed)
    base.clones[0][0].say("4000")
    while base.pager.holes > UNITS // 2:
        pass
    base.pager.stop()
    base.clones[1][0].say("4000")
    second = BasePager(base.image.chain, base.file, [PAGES])
    assert second.holes == base.pager.holes
    for _, descriptor, segment, _ in base.clones:
        second.add(descriptor, [segment])
    for program, *_ in base.clones:
        result = program.json()
        assert result["bad"] == 0
        assert result["reads"] > 0
    assert second.holes == 0
    second.stop()


@pytest.mark.parametrize("part", ["head", "page block"])
def test_damaged_unit_is_never_read_as_zeros_and_is_loaded_once_repaired(base: Base, tmp_path: Path, part: str) -> None:
    offset, length = base.image.image.blocks[3][:2]
    offset += length // 2 if part == "page block" else 0
    with open(tmp_path / "image", "r+b", buffering=0) as file:
        good = os.pread(file.fileno(), 64, offset)
        os.pwrite(file.fileno(), b"\xff" * 64, offset)
        for seed in (1, 2):
            base.clone(seed)
        for program, *_ in base.clones:
            program.say("100")
        for program, *_ in base.clones:
            with pytest.raises(AssertionError, match="no line"):
                _expect_line(program, 3.0)
        assert base.pager.failures
        assert base.pager.holes > 0
        os.pwrite(file.fileno(), good, offset)
    for program, *_ in base.clones:
        assert program.json()["bad"] == 0
    assert base.pager.holes == 0
    assert base.pager.failures == []


def test_units_without_memory_are_loaded_when_memory_is_free(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    # The size is not a multiple of the unit: a write ends within a unit.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5M,huge=never", "none", small], check=True)
    try:
        file = os.open(small, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.ftruncate(file, LENGTH)
        made = Base(tmp_path, file)
        try:
            made.clone(1)
            program = made.clones[0][0]
            program.say("100")
            with pytest.raises(AssertionError, match="no line"):
                _expect_line(program, 3.0)
            assert all("cannot allocate memory" in failure.message for failure in made.pager.failures)
            subprocess.run(["mount", "-o", "remount,size=64M", small], check=True)
            assert program.json()["bad"] == 0
            assert (made.pager.holes, made.pager.failures) == (0, [])
        finally:
            made.close()
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def _mark(base: Base, unit: int) -> None:
    """Leave the mark of a pager that was killed while it wrote the unit."""
    os.pwrite(base.file, (unit + 1).to_bytes(8, sys.byteorder), UNITS * UNIT * PAGE + 8 + unit % 2 * 8)


def _fill(base: Base) -> None:
    base.pager.fill([], True)
    while base.pager.holes:
        pass
    base.pager.stop()


def test_unit_whose_pager_was_killed_while_writing_is_kept_if_it_is_right(base: Base) -> None:
    _fill(base)
    for unit in (6, 7):
        _mark(base, unit)
    BasePager(base.image.chain, base.file, [PAGES]).stop()
    assert os.pread(base.file, PAGE, UNITS * UNIT * PAGE) == bytes(PAGE)


def test_base_with_a_unit_that_a_killed_pager_left_incomplete_is_given_up(base: Base) -> None:
    _fill(base)
    os.pwrite(base.file, bytes(PAGE), 7 * UNIT * PAGE - PAGE)
    _mark(base, 6)
    for _ in range(2):  # the second pager does not compare the unit again
        with pytest.raises(OSError, match="given up: a write of unit 6"):
            BasePager(base.image.chain, base.file, [PAGES])


def test_pager_of_a_base_that_was_given_up_loads_no_further_unit(base: Base) -> None:
    os.pwrite(base.file, (6 + 1).to_bytes(8, sys.byteorder), UNITS * UNIT * PAGE)
    base.clone(1)
    program = base.clones[0][0]
    program.say("100")
    with pytest.raises(AssertionError, match="no line"):
        _expect_line(program, 2.0)
    assert "given up" in base.pager.failures[0].message


def _expect_line(program: Program, timeout: float) -> None:
    """Raise AssertionError if the program prints no line within `timeout` seconds."""
    assert program.process.stdout is not None
    ready, _, _ = select.select([program.process.stdout], [], [], timeout)
    assert ready, "no line"


@pytest.mark.parametrize("pages", [[PAGES - 1], [PAGES, 1], []])
def test_regions_that_do_not_match_the_image_are_rejected(base: Base, pages: list[int]) -> None:
    with pytest.raises(ValueError, match="match"):
        BasePager(base.image.chain, base.file, pages)
