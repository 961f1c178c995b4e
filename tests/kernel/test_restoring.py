"""Migrations and checkpoints during a lazy restore, which start before all pages are loaded and lose no contents."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry._engine import MappedSegment, PageSet, Space, Trace
from pageferry.checkpoints.restore_arena import RestoredArena
from pageferry.cli.main import main
from pageferry.demo.ledger import LedgerOptions, LedgerWorkload
from pageferry.errors import ImageError, WorkloadError
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.images.targets import large_units
from pageferry.pager import client
from pageferry.pager.protocol import PagerStatus
from pageferry.workloads import deferred_access
from pageferry.workloads.arena.arena import Arena
from tests.kernel import moving
from tests.kernel.images import ABSENT, DATA, PAGE, Maker
from tests.kernel.moving import MIB
from tests.kernel.programs import Program
from tests.saved import check_ledger, save

pytestmark = pytest.mark.usefixtures("root")

HERE = Path(__file__).parent
CALM = LedgerOptions(threads=2, rate=4 * MIB, working_set=0.05, zero_fraction=0.2)
HEAVY = LedgerOptions(threads=3, zero_fraction=0.2, compressible=0.4)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return images of running ledgers, by name: `calm` and `heavy`, with a low and a high write rate."""
    folder = tmp_path_factory.mktemp("images")
    made = {}
    for name, options in {"calm": CALM, "heavy": HEAVY}.items():
        workload = LedgerWorkload.create(96 * MIB, options, large_fraction=0.5)
        made[name] = folder / name
        pageferry.checkpoint(workload, made[name])
        workload.stop()
    return made


@contextlib.contextmanager
def restored(image: Path, name: str = "coming") -> Iterator[Program]:
    """Run a ledger that is restored on demand, without prefetch."""
    with Program(str(HERE / "restored_ledger.py"), str(image), name, env=moving.environment(None)) as program:
        said = program.json()
        assert (said["type"], said["deferred"] > 64 * MIB) == ("ready", True)
        yield program


def status(name: str = "coming") -> PagerStatus:
    found = client.status(Registry().folder(name))
    assert found is not None
    return found


def saving(path: Path, name: str = "coming", fault: str | None = None) -> Program:
    command = ("-m", "pageferry", "checkpoint", name, str(path), "--output", "json")
    return Program(*command, env=moving.environment(fault))


def resumed(program: Program) -> None:
    """Continue a process that has stopped at a fault point."""
    os.kill(program.process.pid, signal.SIGCONT)


def ends(here: Program, reason: str = "stopped") -> None:
    """Wait until a ledger exits for `reason`, and check that no write was lost. For `stopped`, send SIGTERM first."""
    if reason == "stopped":
        here.process.terminate()
    end = moving.until(here, "ledger")
    assert (end["intact"], end["reason"]) == (True, reason), end


def comes_to_an_end(here: Program) -> None:
    """Load all pages, and check that the pager has finished and that no trace is left."""
    here.say("load")
    assert here.json() == {"deferred": 0, "finished": True}
    assert moving.traces(here.process.pid) == 0


# -- migrations


def arrives(there: Program) -> None:
    """Wait until a receiver has received its ledger, stop the receiver, and check that no write was lost."""
    assert there.json()["type"] == "received"
    there.process.terminate()
    end = moving.until(there, "ledger")
    assert end["intact"], end


def test_pages_are_sent_while_others_are_deferred(images: dict[str, Path]) -> None:
    with restored(images["calm"]) as here, moving.receiver("there") as there:
        address = moving.address_of(there)
        with moving.migrating("coming", address, fault="source.part-sent=stop") as migration:
            moving.stopped(migration)
            # The source has sent one chunk, and is loading the next one.
            assert status().deferred > 32 * MIB
            resumed(migration)
            result = moving.until(migration, "migration")
            assert migration.wait() == 0
        assert result["normal"] + result["duplicate"] + result["skipped"] >= 96 * MIB // PAGE
        # Loaded pages do not count as written, so they are not sent again.
        assert result["normal"] < 1.5 * 96 * MIB // PAGE
        assert result["large-pages"]["source"] >= 10
        ends(here, "moved")
        arrives(there)


def test_hybrid_migration_during_restore_switches_over_on_request(images: dict[str, Path]) -> None:
    """Pages that have not been sent at the request are loaded before the pause, and sent after the pause."""
    with restored(images["calm"]) as here, moving.receiver("there") as there:
        chosen = ("--mode", "hybrid", "--bandwidth", "64M")
        address = moving.address_of(there)
        with moving.migrating("coming", address, *chosen, fault="source.part-sent=stop") as migration:
            moving.stopped(migration)
            assert main(["migrate", "coming", "--switch"]) == 0
            resumed(migration)
            result = moving.until(migration, "migration")
            assert migration.wait() == 0
        assert result["mode"] == "hybrid"
        ends(here, "moved")
        arrives(there)


@pytest.mark.parametrize("point", ["set-up", "part-sent", "between-rounds", "paused", "ready"])
def test_killed_migration_leaves_restore_intact(images: dict[str, Path], point: str) -> None:
    with restored(images["calm"]) as here:
        with (
            moving.receiver("there") as there,
            moving.migrating("coming", moving.address_of(there), fault=f"source.{point}=kill") as migration,
        ):
            assert migration.wait() == -signal.SIGKILL
        moving.runs("coming")
        # The killed migration has released the userfaultfd of the pager: the next migration can acquire it.
        with moving.receiver("again") as again:
            with moving.migrating("coming", moving.address_of(again)) as migration:
                moving.until(migration, "migration")
                assert migration.wait() == 0
            ends(here, "moved")
            arrives(again)


def test_failed_migration_leaves_restore_running(images: dict[str, Path]) -> None:
    with restored(images["calm"]) as here:
        with (
            moving.receiver("there") as there,
            moving.migrating("coming", moving.address_of(there), fault="source.part-sent=stop") as migration,
        ):
            moving.stopped(migration)
            there.kill()
            resumed(migration)
            assert migration.wait() == 23
        moving.runs("coming")
        assert status().deferred > 0
        comes_to_an_end(here)
        ends(here)


# -- checkpoints


def test_checkpoint_starts_while_pages_are_deferred(images: dict[str, Path], tmp_path: Path) -> None:
    with restored(images["calm"]) as here:
        with saving(tmp_path / "image", fault="checkpoint.part-brought=stop") as saver:
            moving.stopped(saver)
            assert status().deferred > 32 * MIB
            moving.runs("coming")
            resumed(saver)
            result = moving.until(saver, "checkpoint")
            assert saver.wait() == 0
        # The checkpoint saved the pages in rounds while the workload ran. Its write trace causes no traps.
        assert result["rounds"] >= 1
        assert result["traps"] == 0
        assert result["tracking-note"] == "its memory was still being loaded"
        before, after = large_units(ImageFile(images["calm"])), large_units(check_ledger(tmp_path / "image"))
        assert sum(before[0]) >= 10
        assert all(now or not then for then, now in zip(before[0], after[0], strict=True))
        moving.runs("coming")
        comes_to_an_end(here)
        ends(here)


@pytest.mark.parametrize("point", ["part-brought", "armed", "instant", "saved"])
def test_killed_checkpoint_leaves_restore_intact(images: dict[str, Path], tmp_path: Path, point: str) -> None:
    with restored(images["calm"]) as here:
        with saving(tmp_path / "image", fault=f"checkpoint.{point}=kill") as saver:
            assert saver.wait() == -signal.SIGKILL
        assert not (tmp_path / "image").exists()
        moving.runs("coming")
        with saving(tmp_path / "image") as saver:
            assert saver.wait() == 0
        check_ledger(tmp_path / "image")
        comes_to_an_end(here)
        ends(here)


def test_heavy_writer_is_saved_during_restore(images: dict[str, Path], tmp_path: Path) -> None:
    """The write rate is too high for rounds: the checkpoint loads all pages first, and then saves them as usual."""
    with restored(images["heavy"]) as here:
        for number in range(3):
            with saving(tmp_path / f"{number}") as saver:
                moving.until(saver, "checkpoint")
                assert saver.wait() == 0
            check_ledger(tmp_path / f"{number}")
        ends(here)


def words_of(arena: Arena) -> Any:
    """Return a view of the arena as pages of 512 words."""
    return np.frombuffer(arena, dtype=np.uint64).reshape(-1, 512)  # type: ignore[call-overload] # as in test_arena


@pytest.mark.parametrize("based", [False, True])
def test_every_class_of_page_is_saved_during_restore(tmp_path: Path, based: bool) -> None:
    """The program saves its own arena, with and without the restored image as the parent."""
    made, path = Maker(9000), tmp_path / "image"
    original, there = Arena(9000 * PAGE), made.contents.any(axis=1)
    words_of(original)[there] = made.contents[there]
    save(original, path)
    arena = pageferry.restore(path, prefetch=False)
    words = words_of(arena)
    expected = made.contents.copy()
    expected[[5, 8000]] = words[[5, 8000]] = 7
    result = save(arena, tmp_path / "again", parent=path if based else None)
    assert result.tracking == ("compare" if based else "none")
    assert not based or result.pages.data == 0
    saved = ImageFile(tmp_path / "again")
    assert saved.read(0, 9000) == expected.tobytes()
    assert saved.verify() == []
    assert (words == expected).all()
    second = save(arena, tmp_path / "third", parent=tmp_path / "again")
    assert ImageFile(tmp_path / "third").read(0, 9000) == expected.tobytes()
    assert second.pages.data == 0


def test_unreadable_page_fails_only_the_checkpoint(tmp_path: Path) -> None:
    made = Maker(9000, classes=[DATA] * 9000, codec="none", storage_block=65536)
    path = made.write(tmp_path / "image")
    contents = bytearray(path.read_bytes())
    contents[contents.index(made.contents[8000].tobytes())] ^= 1
    path.write_bytes(contents)
    arena = pageferry.restore(path, prefetch=False)
    with pytest.raises(ImageError, match="checksum"):
        save(arena, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    # Pages in other storage blocks can be loaded. Pages in the damaged block stay deferred.
    assert (words_of(arena)[0] == made.contents[0]).all()
    assert arena.deferred > 0
    assert arena.pager.hold() is not None  # the checkpoint has released the userfaultfd
    arena.pager.release()


# -- write traces on the userfaultfd of a pager


class Traced:
    """Arena that is restored on demand, without prefetch, and a write trace on the userfaultfd of its pager."""

    def __init__(self, path: Path) -> None:
        self.arena = pageferry.restore(path, prefetch=False)
        self.words = words_of(self.arena)
        userfaults = self.arena.pager.hold()
        assert userfaults is not None
        segment = MappedSegment(Space(), self.arena.address, self.arena.length)
        self.trace = Trace([segment], userfaults=userfaults)

    def written(self) -> set[int]:
        found = PageSet(self.arena.length // PAGE)
        self.trace.collect([found])
        return {page for first, end in found.runs() for page in range(first, end)}


def test_trace_reports_writes_and_not_loaded_pages(tmp_path: Path) -> None:
    made = Maker(4096, classes=[DATA] * 4000 + [ABSENT] * 96)
    traced = Traced(made.write(tmp_path / "image"))
    assert traced.written() == set()
    assert (traced.words[100:200] == made.contents[100:200]).all()
    traced.arena.ensure(1000 * PAGE, 500 * PAGE)
    assert traced.written() == set()
    traced.words[[150, 1200, 3000], 5] = 1  # a loaded page, a loaded page that is not mapped, and a deferred page
    assert traced.written() == {150, 1200, 3000}
    assert traced.written() == set()
    traced.words[4050, 0] = 1  # a page that is absent from the image
    assert 4050 in traced.written()
    traced.arena.pager.release()
    assert (traced.words[:100] == made.contents[:100]).all()
    traced.arena.load()
    traced.words[[150, 1200, 3000], 5] = made.contents[[150, 1200, 3000], 5]
    assert (traced.words[:4000] == made.contents[:4000]).all()


@pytest.mark.parametrize("seed", range(3))
def test_trace_misses_no_write_while_pages_are_loaded(tmp_path: Path, seed: int) -> None:
    """Threads access random pages, another thread loads pages, and the main thread collects the trace."""
    made = Maker(4096, classes=[DATA] * 4096, storage_block=65536)
    traced = Traced(made.write(tmp_path / "image"))
    copy, over = made.contents.copy(), threading.Event()

    def write(number: int) -> None:
        chance = random.Random(seed * 10 + number)
        for _ in range(6000):
            page = chance.randrange(4096)
            if chance.random() < 0.4:
                traced.words[page, number] += 1
            else:
                assert traced.words[page, 100] == made.contents[page, 100]

    def bring() -> None:
        chance = random.Random(seed)
        while not over.is_set() and traced.arena.deferred:
            traced.arena.ensure(chance.randrange(4000) * PAGE, 64 * PAGE)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    bringer = threading.Thread(target=bring)
    for thread in (*threads, bringer):
        thread.start()

    def send() -> None:
        """Collect the trace and copy the written pages, as a migration does."""
        for page in traced.written():
            copy[page] = traced.words[page]

    while any(thread.is_alive() for thread in threads):
        send()
    over.set()
    for thread in (*threads, bringer):
        thread.join()
    send()
    assert traced.written() == set()
    assert (copy == traced.words).all()
    traced.arena.pager.release()
    traced.arena.load()
    assert (copy == traced.words).all()


def test_userfaultfd_is_borrowed_by_one_operation_at_a_time(tmp_path: Path) -> None:
    arena: RestoredArena = pageferry.restore(Maker(64).write(tmp_path / "image"), prefetch=False)
    workload = arena.workload()
    hold = asyncio.run(deferred_access.acquire_uffd(workload))
    assert hold is not None
    with pytest.raises(WorkloadError, match="another migration or checkpoint is using it"):
        asyncio.run(deferred_access.acquire_uffd(workload))
    arena.ensure(0, arena.length)
    assert not arena.pager.wait(0.1)  # the pager cannot finish while its userfaultfd is acquired
    hold.release()
    hold.release()
    assert arena.pager.wait(10.0)
    assert asyncio.run(deferred_access.acquire_uffd(workload)) is None


def test_child_forked_during_checkpoint_reads_all_pages(tmp_path: Path) -> None:
    """A fork waits until all pages are loaded, but not until the checkpoint ends."""
    made = Maker(1024)
    arena: RestoredArena = pageferry.restore(made.write(tmp_path / "image"), prefetch=False)
    hold = asyncio.run(deferred_access.acquire_uffd(arena.workload()))
    assert hold is not None
    view = words_of(arena)
    if (child := os.fork()) == 0:
        os._exit(0 if (view == made.contents).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    hold.release()
