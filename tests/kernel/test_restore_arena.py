"""Restore of arenas from images of any layout, with accesses in any order and from any process (S10, S8)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.checkpoints.restore_arena import RestoredArena
from pageferry.cli.main import main
from pageferry.errors import ImageError, UsageError
from pageferry.images.image import ImageFile
from pageferry.images.working_set import WorkingSet
from tests.kernel.images import DATA, PAGE, PATTERN, SAME_AS, ZERO, Maker
from tests.kernel.programs import DEADLINE, Program

MIB = 1 << 20


def words(arena: pageferry.Arena) -> Any:
    """Return a view of the arena as pages of 512 words."""
    return np.frombuffer(arena, dtype=np.uint64).reshape(-1, 512)  # type: ignore[call-overload] # as in test_arena


def in_child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Restore an arena in a separate process, and run a script in that process. The script may hang or crash."""
    setup = "import sys\nimport numpy as np\nimport pageferry\narena = pageferry.restore(sys.argv[1], prefetch=False)\n"
    setup += "words = np.frombuffer(arena, dtype=np.uint64).reshape(-1, 512)\n"
    command = [sys.executable, "-c", setup + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(("codec", "storage_block"), [("none", 65536), ("lz4", MIB), ("zstd", 4 * MIB)])
def test_every_class_of_page_is_restored(tmp_path: Path, prefetch: bool, codec: str, storage_block: int) -> None:
    made = Maker(3000, codec=codec, storage_block=storage_block)
    arena = pageferry.restore(made.write(tmp_path / "image"), prefetch=prefetch)
    assert arena.received_state == b"state"
    view = words(arena)
    for page in np.random.default_rng(1).permutation(made.pages)[:300]:
        assert (view[page] == made.contents[page]).all(), page
    assert (view == made.contents).all()
    arena.load()
    assert arena.deferred == 0
    assert (view == made.contents).all()


def test_without_prefetch_only_touched_pages_are_read(tmp_path: Path) -> None:
    made = Maker(4096, classes=[DATA] * 4096, storage_block=65536)
    arena = pageferry.restore(made.write(tmp_path / "image"), prefetch=False)
    assert arena.deferred == 4096 * PAGE
    assert (words(arena)[17] == made.contents[17]).all()
    assert 4000 * PAGE < arena.deferred < 4096 * PAGE


def test_arena_is_collapsed_once_all_pages_are_loaded(tmp_path: Path) -> None:
    made = Maker(4096, classes=[DATA] * 4096)
    arena = pageferry.restore(made.write(tmp_path / "image"), prefetch=False)
    assert (words(arena)[17] == made.contents[17]).all()
    arena.collapse()
    assert (words(arena) == made.contents).all()


def test_pages_without_stored_bytes_are_not_read(tmp_path: Path) -> None:
    made = Maker(512, classes=[DATA] + [PATTERN, ZERO] * 255 + [PATTERN])
    arena = pageferry.restore(made.write(tmp_path / "image"), prefetch=False)
    assert (words(arena)[1:] == made.contents[1:]).all()
    assert arena.pager.counters.bytes_read == 0


def test_working_set_is_recorded_and_prefetched_first(tmp_path: Path) -> None:
    made = Maker(4096, classes=[DATA] * 4096, storage_block=65536)
    path = made.write(tmp_path / "image")
    first = in_child("words[160, 0]; words[3200, 0]; words[32, 0]", path)
    assert first.returncode == 0, first.stderr
    assert WorkingSet(ImageFile(path)).windows == [10, 200, 2]
    arena = pageferry.restore(path)
    arena.load()
    assert (words(arena) == made.contents).all()
    del arena
    # A run without prefetch removes from the working set the pages that it does not access.
    assert in_child("words[3200, 0]; words[48, 0]", path).returncode == 0
    assert WorkingSet(ImageFile(path)).windows == [200]


def test_duplicate_pages_are_read_once_into_separate_memory(tmp_path: Path) -> None:
    made = Maker(512, classes=[DATA] + [SAME_AS] * 511)
    arena = pageferry.restore(made.write(tmp_path / "image"), prefetch=False)
    view = words(arena)
    view[3] = 1
    assert (view[4] == made.contents[4]).all()
    assert (view[0] == made.contents[0]).all()


def test_chain_of_images_is_restored(tmp_path: Path) -> None:
    parent = Maker(2000, seed=1)
    path = parent.write(tmp_path / "0")
    for number in range(1, 5):
        child = Maker(2000, seed=number + 1)
        child.build_on(parent, path)
        path, parent = child.write(tmp_path / str(number)), child
    for prefetch in (True, False):
        arena = pageferry.restore(path, prefetch=prefetch)
        assert (words(arena) == parent.contents).all()


@pytest.mark.usefixtures("root")
def test_large_pages_are_restored_as_large_pages(tmp_path: Path) -> None:
    made = Maker(4096, classes=[DATA] * 4096)
    arena = pageferry.restore(made.write(tmp_path / "image", large=True))
    arena.load()
    assert arena.large_units() == [True] * 8
    assert _smaps(arena.address, "ShmemPmdMapped") == 16384
    assert (words(arena) == made.contents).all()


def test_writes_are_kept_while_pages_are_loaded(tmp_path: Path) -> None:
    made = Maker(8192, classes=[DATA] * 8192)
    path = made.write(tmp_path / "image")
    for seed in range(5):
        arena = pageferry.restore(path, eager=True)
        view, expected = words(arena), made.contents.copy()
        generator = np.random.default_rng(seed)
        while arena.deferred:
            for page in generator.integers(0, made.pages, 64):
                expected[page, 5] = view[page, 5] = generator.integers(1 << 60)
        assert (view == expected).all()


def test_concurrent_writes_to_the_same_pages_are_kept(tmp_path: Path) -> None:
    """Each thread writes to its own word of every page, in a different order. No write is lost."""
    made = Maker(2048, classes=[DATA] * 2048)
    arena = pageferry.restore(made.write(tmp_path / "image"))
    view, expected = words(arena), made.contents.copy()
    expected[:, :4] = 1

    def write(number: int) -> None:
        for page in np.random.default_rng(number).permutation(made.pages):
            view[page, number] = 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (view == expected).all()


def test_fault_with_the_gil_held_does_not_deadlock(tmp_path: Path) -> None:
    """A scalar access through numpy holds the GIL while the access waits for the pager."""
    path = Maker(4096, classes=[DATA] * 4096).write(tmp_path / "image")
    code = """
import threading, time
def touch(start):
    total = 0
    for page in range(start, 4096, 4):
        total += int(words[page, 100])
    assert total
threads = [threading.Thread(target=touch, args=(start,)) for start in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(arena.deferred)
"""
    done = in_child(code, path)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_clones_have_separate_memory(tmp_path: Path) -> None:
    made = Maker(2048)
    path = made.write(tmp_path / "image")
    clones = [pageferry.restore(path) for _ in range(3)]
    for number, clone in enumerate(clones):
        words(clone)[:, 0] = number
    for number, clone in enumerate(clones):
        assert (words(clone)[:, 0] == number).all()
        assert (words(clone)[:, 1:] == made.contents[:, 1:]).all()


def test_forked_child_reads_all_pages(tmp_path: Path) -> None:
    made = Maker(1024)
    arena = pageferry.restore(made.write(tmp_path / "image"), prefetch=False)
    view = words(arena)
    if (child := os.fork()) == 0:
        os._exit(0 if (view == made.contents).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert arena.deferred == 0


def _smaps(address: int, field: str) -> int:
    """Return the value of a field in the smaps entry at an address, KiB."""
    entry = Path("/proc/self/smaps").read_text().split(f"\n{address:x}-")[1]
    return int(entry.split(f"\n{field}:")[1].split()[0])


def damage(path: Path, pattern: bytes) -> None:
    """Flip one bit in an image: in the first byte of `pattern`, the stored bytes of a page."""
    contents = bytearray(path.read_bytes())
    contents[contents.index(pattern)] ^= 1
    path.write_bytes(contents)


def test_damaged_page_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    made = Maker(64, classes=[DATA] * 64, codec="none", storage_block=65536)
    path = made.write(tmp_path / "image")
    damage(path, made.contents[33].tobytes())
    done = in_child("print(words[33, 0])", path)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == ""
    assert "pageferry: cannot read page 33 of region 0: storage block" in done.stderr
    arena = pageferry.restore(path)
    good = [page for page in range(64) if _readable(arena, page)]
    assert 33 not in good
    assert (words(arena)[good] == made.contents[good]).all()
    with pytest.raises(ImageError, match="checksum mismatch"):
        arena.load()


def test_image_truncated_during_restore_is_an_error(tmp_path: Path) -> None:
    made = Maker(512, classes=[DATA] * 512, codec="none", storage_block=65536)
    path = made.write(tmp_path / "image")
    done = in_child("import os; os.truncate(sys.argv[1], 8192); print(words[33, 0])", path)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "")
    assert "cannot read" in done.stderr


def test_invalid_images_and_ranges_are_refused(tmp_path: Path) -> None:
    (tmp_path / "no").write_bytes(bytes(5000))
    with pytest.raises(ImageError, match="not a pageferry image"):
        pageferry.restore(tmp_path / "no")
    with pytest.raises(ImageError, match="cannot open"):
        pageferry.restore(tmp_path / "none")
    arena = pageferry.restore(Maker(16).write(tmp_path / "image"))
    with pytest.raises(UsageError, match="bytes at"):
        arena.ensure(60000, 10000)


def _readable(arena: RestoredArena, page: int) -> bool:
    try:
        arena.ensure(page * PAGE, PAGE)
    except ImageError:
        return False
    return True


OWNER = """
import sys
import pageferry
arena = pageferry.restore(sys.argv[1], sys.argv[2], prefetch=False, on_pause=lambda: None)
print(arena.deferred, flush=True)
for line in sys.stdin:
    print(arena.deferred, flush=True)
"""


def test_other_processes_read_deferred_pages_of_a_named_arena(tmp_path: Path, capfdbinary: Any) -> None:
    made = Maker(4096, classes=[DATA] * 4096, storage_block=65536)
    with Program("-c", OWNER, str(made.write(tmp_path / "image")), "coming") as owner:
        before = int(owner.line())
        assert main(["peek", "coming", hex(70 * PAGE + 8), "16", "--raw"]) == 0
        assert capfdbinary.readouterr().out == made.contents[70].tobytes()[8:24]
        assert main(["--output", "json", "list"]) == 0
        (listed,) = map(json.loads, capfdbinary.readouterr().out.splitlines())
        assert before - 16 * PAGE <= listed["deferred"] < before
        assert main(["checkpoint", "coming", str(tmp_path / "again")]) == 0
        owner.say("how much?")
        assert owner.line() == "0"
    image = ImageFile(tmp_path / "again")
    assert image.read(0, 4096) == made.contents.tobytes()


def test_peek_outside_of_memory_is_refused(tmp_path: Path) -> None:
    with Program("-c", OWNER, str(Maker(16).write(tmp_path / "image")), "small") as owner:
        owner.line()
        assert main(["peek", "small", "0x10000", "1"]) == 2
        assert main(["peek", "small", "0", "64K"]) == 0
        assert main(["peek", "small", "0", "16", "--region", "other"]) == 2


def test_arena_can_be_migrated_during_restore(tmp_path: Path) -> None:
    made = Maker(4096, classes=[DATA] * 4096, storage_block=65536)
    mover = str(Path(__file__).parent / "arena_mover.py")
    with (
        Program(mover, "destination", "stateless") as there,
        Program("-c", OWNER, str(made.write(tmp_path / "image")), "coming") as here,
    ):
        assert int(here.line()) == 4096 * PAGE
        assert main(["migrate", "coming", there.json()["address"]]) == 0
        assert there.json()["digest"] == hashlib.blake2b(made.contents.tobytes()).hexdigest()
