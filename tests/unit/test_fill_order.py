"""Tests of the order in which a pager loads an image in the background."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pageferry._engine import Mapping, Pager, TargetRegion
from pageferry.images.image import ImageFile
from pageferry.pager import records
from pageferry.pager.fill_order import fill_order
from tests.kernel.images import DATA, PAGE, Maker


def chain(tmp_path: Path) -> ImageFile:
    """Return an image with two storage blocks, and with a parent that has four."""
    parent = Maker(64, classes=[DATA] * 64, storage_block=16 * PAGE)
    path = parent.write(tmp_path / "parent")
    child = Maker(64, classes=[DATA] * 64, storage_block=16 * PAGE, seed=2)
    child.build_on(parent, path)
    return ImageFile(child.write(tmp_path / "child"))


def test_working_set_precedes_the_blocks_of_the_image_and_of_its_parent(tmp_path: Path) -> None:
    order = fill_order(chain(tmp_path), [3, 1])
    assert order.windows == [3, 1]
    assert order.blocks == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("blocks", [[], [(1, 3), (0, 0)], [(1, 3), (1, 2), (1, 1), (1, 0), (0, 1), (0, 0)]])
def test_any_order_loads_everything(tmp_path: Path, blocks: list[tuple[int, int]]) -> None:
    image = chain(tmp_path)
    pager, memory = load(image, blocks)
    try:
        while not pager.wait(1.0):
            pass
        assert bytes(memoryview(memory)) == image.read(0, image.pages)
    finally:
        pager.stop()


@pytest.mark.parametrize("block", [(0, 2), (2, 0), (1, 1 << 31)])
def test_block_that_does_not_exist_is_refused(tmp_path: Path, block: tuple[int, int]) -> None:
    with pytest.raises(OSError, match=rf"image {block[0]} of the chain has no storage block {block[1]}"):
        load(chain(tmp_path), [(0, 0), block])


def load(image: ImageFile, blocks: list[tuple[int, int]]) -> tuple[Pager, Mapping]:
    """Load the storage blocks of an image into new memory, in this order. Return the pager and the memory."""
    file = os.memfd_create("memory")
    os.ftruncate(file, image.pages * PAGE)
    flags = records.create_flags(None, Pager.flags_length(image.pages))
    try:
        memory = Mapping(file, image.pages * PAGE)
        target = TargetRegion(memory, PAGE, [])
        return Pager(image.chain, [target], [], {}, flags, fill="eager", blocks=blocks), memory
    finally:
        os.close(file)
        os.close(flags)
