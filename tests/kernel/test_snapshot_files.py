"""Snapshots of Firecracker as images: import and export of full and diff snapshots."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import pageferry
from pageferry._engine import large_tmpfs
from pageferry.cli.main import main
from pageferry.errors import CheckpointError, ImageError, UsageError

PAGE = 4096
PAGES = 3000


@pytest.fixture
def snapshot(tmp_path: Path) -> tuple[Path, Path]:
    """Return the memory file and the state file of a snapshot: sparse, with zero pages, patterns and duplicates."""
    memory, state = tmp_path / "memory", tmp_path / "vmstate"
    generator = np.random.default_rng(3)
    with open(memory, "wb") as file:
        os.truncate(file.fileno(), PAGES * PAGE)
        for page in range(2000):
            if page % 5 == 0:
                continue  # a hole
            contents = {1: bytes(PAGE), 2: b"ab" * (PAGE // 2), 3: b"duplicate" + bytes(PAGE - 9)}.get(page % 17)
            os.pwrite(file.fileno(), contents or generator.bytes(PAGE), page * PAGE)
    state.write_bytes(generator.bytes(30_001))
    return memory, state


def changed(memory: Path, path: Path, pages: list[int]) -> Path:
    """Write a diff snapshot in which these pages have other contents; return the full memory as a second file."""
    full = path.with_suffix(".full")
    full.write_bytes(memory.read_bytes())
    with open(path, "wb") as diff, open(full, "r+b") as whole:
        os.truncate(diff.fileno(), PAGES * PAGE)
        for page in pages:
            contents = bytes(PAGE) if page % 2 else page.to_bytes(8, "little") * (PAGE // 8)
            for file in (diff, whole):
                os.pwrite(file.fileno(), contents, page * PAGE)
    return full


def exported(image: Path) -> tuple[bytes, bytes]:
    """Return the memory and the state that are exported from an image."""
    memory, state = image.with_suffix(".m"), image.with_suffix(".s")
    result = pageferry.export_image(image, firecracker=memory, vmstate=state)
    assert result.length == memory.stat().st_size
    return memory.read_bytes(), state.read_bytes()


def test_snapshot_is_exported_as_it_was_imported(snapshot: tuple[Path, Path], tmp_path: Path) -> None:
    memory, state = snapshot
    image = tmp_path / "image"
    result = pageferry.import_image(image, firecracker=memory, vmstate=state)
    assert (result.memory, result.parent) == (PAGES * PAGE, None)
    info = pageferry.image_info(image)
    assert (info.kind, info.state, info.restorable) == ("firecracker", 30_001, True)
    assert info.regions[0].pages["absent"] >= 1000
    assert info.regions[0].pages["same-as"] > 50
    assert pageferry.verify_image(image).intact
    assert exported(image) == (memory.read_bytes(), state.read_bytes())
    assert (tmp_path / "image.m").stat().st_blocks * 512 < 2000 * PAGE


def test_diff_snapshot_is_merged_with_its_parent(snapshot: tuple[Path, Path], tmp_path: Path) -> None:
    memory, state = snapshot
    pageferry.import_image(tmp_path / "base", firecracker=memory, vmstate=state)
    diff = tmp_path / "diff"
    pages = [3, 4, 5, 6, 1500, 2500, 2999]
    full = changed(memory, diff, pages)
    other = tmp_path / "other-state"
    other.write_bytes(b"later")
    result = pageferry.import_image(tmp_path / "next", firecracker=diff, vmstate=other, parent=tmp_path / "base")
    assert result.parent == str(tmp_path / "base")
    assert pageferry.image_info(tmp_path / "next").regions[0].pages["parent"] > 1000
    assert exported(tmp_path / "next") == (full.read_bytes(), b"later")
    assert (tmp_path / "next").stat().st_size < (tmp_path / "base").stat().st_size / 10
    # A full snapshot of the same memory: its holes are zeros, and equal pages are not stored again.
    result = pageferry.import_image(
        tmp_path / "full", firecracker=full, vmstate=other, parent=tmp_path / "base", full=True
    )
    assert result.stored <= len(pages)
    assert exported(tmp_path / "full") == (full.read_bytes(), b"later")


def test_holes_of_a_full_snapshot_replace_pages_of_the_parent(snapshot: tuple[Path, Path], tmp_path: Path) -> None:
    memory, state = snapshot
    pageferry.import_image(tmp_path / "base", firecracker=memory, vmstate=state)
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        os.truncate(file.fileno(), PAGES * PAGE)
        os.pwrite(file.fileno(), memory.read_bytes()[: 40 * PAGE], 0)
    pageferry.import_image(tmp_path / "next", firecracker=sparse, vmstate=state, parent=tmp_path / "base", full=True)
    assert exported(tmp_path / "next")[0] == sparse.read_bytes()


def test_command_line_does_the_same(snapshot: tuple[Path, Path], tmp_path: Path) -> None:
    memory, state = snapshot
    image, again = tmp_path / "image", tmp_path / "again"
    files = ["--firecracker", str(memory), "--vmstate", str(state)]
    assert main(["image", "import", *files, str(image), "--codec", "zstd"]) == 0
    assert main(["image", "export", "--firecracker", str(again), "--vmstate", str(tmp_path / "s"), str(image)]) == 0
    assert again.read_bytes() == memory.read_bytes()
    assert main(["image", "import", *files, str(tmp_path / "x"), "--full"]) == UsageError.exit_code


def test_unusable_files_are_refused_and_nothing_is_written(snapshot: tuple[Path, Path], tmp_path: Path) -> None:
    memory, state = snapshot
    odd, empty, image = tmp_path / "odd", tmp_path / "empty", tmp_path / "image"
    odd.write_bytes(bytes(PAGE + 1))
    empty.write_bytes(b"")
    (tmp_path / "fifo").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "fifo")
    for wrong, cause in (
        ((odd, state), "multiple of 4096"),
        ((empty, state), "multiple of 4096"),
        ((memory, empty), "it is empty"),
        ((tmp_path / "none", state), "No such file"),
        ((tmp_path / "fifo", state), "FIFO"),
        ((memory, tmp_path / "none"), "No such file"),
    ):
        with pytest.raises(UsageError, match=cause):
            pageferry.import_image(image, firecracker=wrong[0], vmstate=wrong[1])
    for target in (memory, state):
        with pytest.raises(UsageError, match="a file of the snapshot"):
            pageferry.import_image(target, firecracker=memory, vmstate=state)
    with pytest.raises(CheckpointError, match="create its directory"):
        pageferry.import_image(tmp_path / "none" / "image", firecracker=memory, vmstate=state)
    assert not image.exists()


def test_parent_must_be_the_image_of_a_snapshot_of_this_size_in_the_same_directory(
    snapshot: tuple[Path, Path], tmp_path: Path
) -> None:
    memory, state = snapshot
    small = tmp_path / "small"
    small.write_bytes(bytes(PAGE))
    pageferry.import_image(tmp_path / "tiny", firecracker=small, vmstate=state)
    pageferry.checkpoint(pageferry.Arena(1 << 20), tmp_path / "arena")
    pageferry.import_image(tmp_path / "base", firecracker=memory, vmstate=state)
    (tmp_path / "elsewhere").mkdir()
    for parent, target, cause in (
        ("tiny", "image", "its memory has 4096 bytes"),
        ("arena", "image", "kind arena"),
        ("base", "elsewhere/image", "must be in the same directory"),
        ("base", "base", "would replace an image in the chain"),
    ):
        with pytest.raises(UsageError, match=cause):
            pageferry.import_image(tmp_path / target, firecracker=memory, vmstate=state, parent=tmp_path / parent)
    with pytest.raises(UsageError, match="kind arena"):
        pageferry.export_image(tmp_path / "arena", firecracker=tmp_path / "m", vmstate=tmp_path / "s")
    with pytest.raises(UsageError, match="would replace"):
        pageferry.export_image(tmp_path / "base", firecracker=tmp_path / "base", vmstate=tmp_path / "s")


def test_memory_file_that_is_still_being_written_is_refused(snapshot: tuple[Path, Path], tmp_path: Path) -> None:
    from pageferry.checkpoints.snapshot_files import _MemoryReader

    memory, _ = snapshot
    file = os.open(memory, os.O_RDONLY)
    try:
        reader = _MemoryReader(memory, file, PAGES * PAGE, whole=False)
        reader.check_unchanged()
        os.truncate(memory, PAGE)
        with pytest.raises(CheckpointError, match="it was changed during the import"):
            reader.check_unchanged()
        with pytest.raises(CheckpointError, match="it was changed during the import"):
            reader.read(0, 2 * PAGE)
    finally:
        os.close(file)


def test_damaged_image_is_not_exported(snapshot: tuple[Path, Path], tmp_path: Path) -> None:
    memory, state = snapshot
    image = tmp_path / "image"
    pageferry.import_image(image, firecracker=memory, vmstate=state)
    with open(image, "r+b") as file:
        file.seek(image.stat().st_size // 2)
        file.write(bytes(64))
    with pytest.raises(ImageError):
        pageferry.export_image(image, firecracker=tmp_path / "m", vmstate=tmp_path / "s")
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "s").exists()


def test_arena_is_not_restored_from_it(snapshot: tuple[Path, Path], tmp_path: Path) -> None:
    memory, state = snapshot
    pageferry.import_image(tmp_path / "image", firecracker=memory, vmstate=state)
    with pytest.raises(UsageError, match="kind firecracker"):
        pageferry.restore(tmp_path / "image")


def test_diff_snapshot_on_huge_pages_is_refused(snapshot: tuple[Path, Path], tmp_path: Path, root: None) -> None:
    memory, state = snapshot
    pageferry.import_image(tmp_path / "base", firecracker=memory, vmstate=state)
    folder = large_tmpfs(PAGES * PAGE * 2)
    diff = Path(f"/proc/self/fd/{folder}/diff")
    try:
        changed(memory, diff, [7])
        with pytest.raises(UsageError, match="do not show which pages are unchanged"):
            pageferry.import_image(tmp_path / "next", firecracker=diff, vmstate=state, parent=tmp_path / "base")
    finally:
        os.close(folder)
    assert not (tmp_path / "next").exists()


def test_files_of_a_snapshot_are_not_exported_to_one_path(snapshot: tuple[Path, Path], tmp_path: Path) -> None:
    memory, state = snapshot
    pageferry.import_image(tmp_path / "image", firecracker=memory, vmstate=state)
    with pytest.raises(UsageError, match="to the same path"):
        pageferry.export_image(tmp_path / "image", firecracker=tmp_path / "out", vmstate=tmp_path / "." / "out")
    assert not (tmp_path / "out").exists()
