"""Page sharing during a lazy restore (S8, S9): the scan counts deferred pages by signature, without loading them."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pageferry
from pageferry._engine import SMALL_PAGE, PagerFlags
from pageferry.host.registry import Folder, Registry
from pageferry.images.image import ImageFile
from pageferry.pager import client
from pageferry.sharing import api
from pageferry.sharing.events import SharingResult
from tests.kernel.images import Maker
from tests.kernel.lookalike import SLOTS, content, unique, worth
from tests.kernel.programs import Program

pytestmark = pytest.mark.usefixtures("root")

NAME = "coming"


@contextmanager
def restored(image: Path) -> Iterator[Program]:
    with Program("-m", "tests.kernel.restored_owner", str(image), NAME) as program:
        assert program.json() > 0
        yield program


def order(program: Program, words: str) -> object:
    program.say(words)
    return program.json()


def state() -> tuple[bytes, int, int]:
    """Return the deferred bitmap, and the numbers of pages loaded and bytes read. Loading a page changes all three."""
    folder = Folder(Registry(), NAME)
    found = client.deferred_bits(folder)
    status = client.status(folder)
    assert found is not None
    assert status is not None
    with open(found[0], "rb") as flags:
        return flags.read(), status.loaded, status.bytes_read


def find() -> SharingResult:
    return api.find([NAME], threshold=64)


def save(path: Path, numbers: list[int | None], *, large: bool = True) -> Path:
    """Save an image of an arena to `path`, and return `path`.

    `numbers`: contents of the pages (see `lookalike`); None for pages that are never accessed.
    """
    arena = pageferry.Arena(len(numbers) * SMALL_PAGE, large_pages=large)
    memory = memoryview(arena)
    for page, number in enumerate(numbers):
        if number is not None:
            memory[page * SMALL_PAGE : (page + 1) * SMALL_PAGE] = content(number)
    pageferry.checkpoint(arena, path)
    return path


def various(units: int, seed: int = 1) -> list[int | None]:
    """Return numbers that give page contents of all kinds. The last 3 MiB are never accessed."""
    choice = random.Random(seed)
    numbers: list[int | None] = [
        choice.choice((0, -choice.randrange(1, 5), choice.randrange(1, 200), unique(page)))
        for page in range(units * SLOTS)
    ]
    numbers[-SLOTS * 3 // 2 :] = [None] * (SLOTS * 3 // 2)
    return numbers


def digest(image: Path) -> str:
    """Return the SHA-256 digest of the memory in an image."""
    opened = ImageFile(image)
    return hashlib.sha256(opened.read(0, opened.pages)).hexdigest()


@pytest.mark.parametrize("touched", [(), (0, 1, 700, 2000)])
def test_deferred_pages_are_counted_without_loading(tmp_path: Path, touched: tuple[int, ...]) -> None:
    numbers = various(6)
    image = save(tmp_path / "image", numbers)
    with restored(image) as program:
        for page in touched:
            order(program, f"touch {page}")
        before = state()
        found = find()
        assert state() == before
        assert found.deferred > 3 * SLOTS * SMALL_PAGE
        order(program, "load")
        then = find()
        assert then.deferred == 0
        assert (found.classes, found.reclaimable, found.curve) == (then.classes, then.reclaimable, then.curve)
        assert found.large_pages == then.large_pages == 5
        assert found.memory + found.deferred == then.memory
        # Pages of the fifth huge page that were never accessed are zeros in memory.
        expected, freed = worth([[number or 0 for number in numbers[: 5 * SLOTS]]])
        assert {name: one.pages for name, one in found.classes.items()} == expected
        assert {name: one.reclaimable // SMALL_PAGE for name, one in found.classes.items()} == freed
        assert order(program, "check") == digest(image)


def test_deferred_pages_of_small_page_images_are_counted(tmp_path: Path) -> None:
    numbers = various(6)
    image = save(tmp_path / "image", numbers, large=False)
    with restored(image) as program:
        before = state()
        found = find()
        assert state() == before
        expected, _ = worth([[number for number in numbers if number]])  # zeros stay holes
        assert {name: one.pages for name, one in found.classes.items()} == expected
        assert order(program, "check") == digest(image)


def test_deferred_and_present_duplicates_are_matched(tmp_path: Path) -> None:
    """The hash of a page in memory equals the signature of the page in an image."""
    image = save(tmp_path / "image", [unique(page) for page in range(2 * SLOTS)])
    with restored(image) as program, Program("-m", "tests.kernel.restored_owner", str(image), "here") as other:
        other.json()
        order(other, "load")
        before = state()
        found = api.find([NAME, "here"], threshold=64)
        assert state() == before
        assert found.classes["across"].pages == 4 * SLOTS
        assert found.classes["across"].reclaimable == 2 * SLOTS * SMALL_PAGE
        assert order(program, "check") == order(other, "check")


def test_deferred_pages_of_an_image_chain_are_counted(tmp_path: Path) -> None:
    """The child image has the signatures of the pages that are stored in the parent image."""
    numbers = various(4)
    arena = pageferry.Arena(len(numbers) * SMALL_PAGE)
    memory = memoryview(arena)

    def write(pages: list[int]) -> None:
        for page in pages:
            memory[page * SMALL_PAGE : (page + 1) * SMALL_PAGE] = content(numbers[page] or 0)

    write(list(range(2 * SLOTS)))
    pageferry.checkpoint(arena, tmp_path / "0")
    write(list(range(SLOTS, 3 * SLOTS)))
    pageferry.checkpoint(arena, tmp_path / "1", parent=tmp_path / "0")
    assert len(ImageFile(tmp_path / "1").links) == 2
    with restored(tmp_path / "1") as program:
        before = state()
        found = find()
        assert state() == before
        expected, _ = worth([[number or 0 for number in numbers[: 3 * SLOTS]]])
        assert {name: one.pages for name, one in found.classes.items()} == expected
        assert order(program, "check") == digest(tmp_path / "1")


def test_sharing_completes_the_restore_first(tmp_path: Path) -> None:
    image = save(tmp_path / "image", [unique(page) if page % 2 else 0 for page in range(2 * SLOTS)])
    with restored(image) as program:
        result = api.share([NAME], threshold=1)
        assert result.deferred == 0
        assert result.freed == result.estimated == SLOTS * SMALL_PAGE
        assert order(program, "check") == digest(image)


def test_flags_of_other_memory_are_refused(tmp_path: Path) -> None:
    image = ImageFile(Maker(64).write(tmp_path / "image"))
    flags = os.memfd_create("flags")
    os.ftruncate(flags, 4096)
    with pytest.raises(ValueError, match="invalid image"):
        PagerFlags(flags, 65, image.image)
    os.close(flags)
