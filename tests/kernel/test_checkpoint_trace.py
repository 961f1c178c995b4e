"""Incremental checkpoints by write trace: the images equal those by comparison with the parent (S2, S4)."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import mmap
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry import _engine
from pageferry.checkpoints import events
from pageferry.demo.ledger import LedgerOptions
from pageferry.events import Event
from pageferry.images.image import ImageFile
from pageferry.workloads import persistent_trace
from pageferry.workloads.arena.arena import Arena
from tests.saved import check_ledger, ledger, memory_of, save

MIB = 1 << 20
PAGE = 4096


def filled(pages: int = 4096, large_pages: bool = False) -> tuple[Arena, Any]:
    """Return an arena of random pages, and a view of the arena as pages of 512 words."""
    arena = Arena(pages * PAGE, large_pages=large_pages)
    memoryview(arena)[:] = os.urandom(pages * PAGE)
    return arena, np.frombuffer(arena, dtype=np.uint64).reshape(-1, 512)  # type: ignore[call-overload]


def punch(arena: Arena, page: int, pages: int) -> None:
    hole = ("--punch-hole", "--offset", str(page * PAGE), "--length", str(pages * PAGE), "-n")
    subprocess.run(["fallocate", *hole, f"/proc/{os.getpid()}/fd/{arena.descriptor}"], check=True)


def wp_registered(address: int) -> bool:
    """Return whether the mapping at an address is registered for write protection (`uw` in VmFlags of smaps)."""
    with open("/proc/self/smaps") as smaps:
        inside = False
        for line in smaps:
            if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = start <= address < end
            elif inside and line.startswith("VmFlags:"):
                return " uw" in line
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.mark.parametrize("large_pages", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_traced_chain_under_a_heavy_writer_is_consistent(tmp_path: Path, processes: int, large_pages: bool) -> None:
    options = LedgerOptions(threads=2, zero_fraction=0.2, compressible=0.4, working_set=0.3)
    with ledger(16 * MIB, options, processes=processes, large_pages=large_pages) as workload:
        images = [tmp_path / f"image{number}" for number in range(10)]
        results = [save(workload, images[0], track=True)]
        for parent, image in itertools.pairwise(images):
            results.append(save(workload, image, parent=parent))
    assert [result.tracking for result in results] == ["none"] + 9 * ["trace"]
    assert all(result.tracked for result in results)
    for image in images:
        check_ledger(image)
    assert all(result.traps == 0 and result.written > 0 for result in results[1:])
    pageferry.flatten_image(images[-1], tmp_path / "flat")
    check_ledger(tmp_path / "flat")


@pytest.mark.parametrize("end", ["no-track", "large-pages"])
def test_large_mappings_are_restored_with_removal_of_the_trace(tmp_path: Path, end: str) -> None:
    arena, words = filled(large_pages=True)
    space = _engine.Space()
    whole = [(arena.address, arena.address + arena.length)]
    assert space.large_mapped(arena.address, arena.length) == whole
    save(arena, tmp_path / "0", track=True)
    words[::100] = 1
    save(arena, tmp_path / "1", parent=tmp_path / "0")
    assert space.large_mapped(arena.address, arena.length) == []
    if end == "no-track":
        save(arena, tmp_path / "2", parent=tmp_path / "1", track=False)
    else:
        persistent_trace.forget(arena.workload())
    assert space.large_mapped(arena.address, arena.length) == whole


@pytest.mark.parametrize("seed", range(4))
def test_traced_and_compared_images_are_identical(tmp_path: Path, seed: int) -> None:
    """Images of the same memory, one by write trace and one by comparison, have the same contents and page classes."""
    chance = random.Random(seed)
    arena, words = filled(large_pages=seed % 2 == 1)
    save(arena, tmp_path / "0", track=True)
    for number in range(1, 6):
        for page in chance.sample(range(4096), 300):
            words[page] = chance.choice([0, 5, words[chance.randrange(4096)], chance.randrange(1, 1 << 60)])
        first = chance.randrange(4000)
        punch(arena, first, 50)
        if chance.random() < 0.5:
            assert not words[first + 10].any()
        if chance.random() < 0.5:
            words[first + 20, 3] = 7
        parent = tmp_path / str(number - 1)
        traced = save(arena, tmp_path / str(number), parent=parent)
        assert traced.tracking == "trace", traced.tracking_note
        image = ImageFile(tmp_path / str(number))
        assert memoryview(memory_of(image)) == memoryview(arena)
        assert image.verify() == []
    compared = save(arena, tmp_path / "compared", parent=tmp_path / "4", track=False)
    assert compared.tracking == "compare"
    assert ImageFile(tmp_path / "5").differences(ImageFile(tmp_path / "compared")) == []
    assert traced.pages.in_parent == compared.pages.in_parent


def test_only_written_pages_are_stored(tmp_path: Path) -> None:
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    words[17, 5] = 1
    words[900, 5] = 1
    result = save(arena, tmp_path / "1", parent=tmp_path / "0")
    assert (result.tracking, result.written, result.rounds) == ("trace", 2, 0)
    assert (result.pages.data, result.pages.in_parent) == (2, 4094)
    result = save(arena, tmp_path / "2", parent=tmp_path / "1")
    assert (result.written, result.pages.in_parent) == (0, 4096)
    assert memoryview(memory_of(ImageFile(tmp_path / "2"))) == memoryview(arena)


def test_discarded_pages_are_found(tmp_path: Path) -> None:
    """Some discarded pages stay holes, some are read (which a trace does not report), and one is written."""
    arena, words = filled()
    words[40] = 9  # a pattern (same-value filled page)
    save(arena, tmp_path / "0", track=True)
    punch(arena, 10, 40)
    assert not words[20:30].any()
    words[30] = 1
    result = save(arena, tmp_path / "1", parent=tmp_path / "0")
    assert result.tracking == "trace"
    assert memoryview(memory_of(ImageFile(tmp_path / "1"))) == memoryview(arena)


def test_first_incremental_compares_and_leaves_a_trace(tmp_path: Path) -> None:
    arena, words = filled()
    assert not save(arena, tmp_path / "0").tracked
    assert not wp_registered(arena.address)
    second = save(arena, tmp_path / "1", parent=tmp_path / "0")
    assert (second.tracking, second.tracked) == ("compare", True)
    assert "left no write trace" in second.tracking_note
    assert wp_registered(arena.address)
    words[5] = 1
    assert save(arena, tmp_path / "2", parent=tmp_path / "1").tracking == "trace"


def test_trace_is_not_used_for_another_parent(tmp_path: Path) -> None:
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    words[5] = 1
    save(arena, tmp_path / "1", parent=tmp_path / "0")
    words[6] = 1
    result = save(arena, tmp_path / "2", parent=tmp_path / "0")
    assert (result.tracking, result.tracked) == ("compare", True)
    assert "to another image" in result.tracking_note
    assert memoryview(memory_of(ImageFile(tmp_path / "2"))) == memoryview(arena)
    assert save(arena, tmp_path / "3", parent=tmp_path / "2").tracking == "trace"


def test_track_false_leaves_no_trace(tmp_path: Path) -> None:
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    result = save(arena, tmp_path / "1", parent=tmp_path / "0", track=False)
    assert (result.tracking, result.tracked) == ("trace", False)
    assert not wp_registered(arena.address)
    words[5] = 1
    assert save(arena, tmp_path / "2", parent=tmp_path / "1", track=False).tracking == "compare"
    assert memoryview(memory_of(ImageFile(tmp_path / "2"))) == memoryview(arena)


def test_memory_traced_by_another_userfaultfd_is_refused(tmp_path: Path) -> None:
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    persistent_trace.forget(arena.workload())
    other = _engine.Trace([_engine.MappedSegment(_engine.Space(), arena.address, arena.length)])
    with pytest.raises(pageferry.errors.WorkloadError, match="another userfaultfd"):
        save(arena, tmp_path / "1", parent=tmp_path / "0")
    other.remove()
    words[5] = 1
    assert save(arena, tmp_path / "1", parent=tmp_path / "0").tracking == "compare"
    assert memoryview(memory_of(ImageFile(tmp_path / "1"))) == memoryview(arena)


def test_reused_descriptor_number_is_left_alone(tmp_path: Path) -> None:
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    (record,) = (one for key, one in persistent_trace._own.items() if key == persistent_trace._key(arena.workload()))
    number = record.descriptors[os.getpid()].number
    os.close(number)
    os.dup2(0, number)  # the number now refers to another file
    words[5] = 1
    result = save(arena, tmp_path / "1", parent=tmp_path / "0")
    assert result.tracking == "compare"
    assert "was closed" in result.tracking_note
    os.fstat(number)
    os.close(number)
    assert memoryview(memory_of(ImageFile(tmp_path / "1"))) == memoryview(arena)


def test_trace_is_not_used_after_fork(tmp_path: Path) -> None:
    """The trace does not cover the writes of a forked child that has exited."""
    arena, _ = filled()
    save(arena, tmp_path / "0", track=True)
    if (child := os.fork()) == 0:
        memoryview(arena)[12345] ^= 1
        os._exit(0)
    os.waitpid(child, 0)
    result = save(arena, tmp_path / "1", parent=tmp_path / "0")
    assert (result.tracking, result.tracking_note) == ("compare", "the program has forked since the checkpoint")
    assert memoryview(memory_of(ImageFile(tmp_path / "1"))) == memoryview(arena)


def test_trace_is_not_used_after_memory_was_mapped_again(tmp_path: Path) -> None:
    """The new mapping has the same address, file and offset, but no trace."""
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    _map_anew(arena, 100, 8)
    words[105] = 1
    result = save(arena, tmp_path / "1", parent=tmp_path / "0")
    assert (result.tracking, result.tracked) == ("compare", True)
    assert "does not cover all memory" in result.tracking_note
    assert memoryview(memory_of(ImageFile(tmp_path / "1"))) == memoryview(arena)
    words[106] = 1
    assert save(arena, tmp_path / "2", parent=tmp_path / "1").tracking == "trace"
    assert memoryview(memory_of(ImageFile(tmp_path / "2"))) == memoryview(arena)


def _map_anew(arena: Arena, page: int, pages: int) -> None:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    shared_fixed = mmap.MAP_SHARED | 0x10
    access = mmap.PROT_READ | mmap.PROT_WRITE
    address = arena.address + page * PAGE
    assert libc.mmap(address, pages * PAGE, access, shared_fixed, arena.descriptor, page * PAGE) == address


def test_image_of_heavy_writer_is_consistent_with_or_without_rounds(tmp_path: Path) -> None:
    """With `at_snapshot_point=0`, the number of rounds depends on timing. The image is consistent for any number."""
    with ledger(8 * MIB, LedgerOptions(threads=3)) as workload:
        save(workload, tmp_path / "0", track=True)
        for number in range(1, 6):
            parent = tmp_path / str(number - 1)
            save(workload, tmp_path / str(number), parent=parent, at_snapshot_point=0)
            check_ledger(tmp_path / str(number))


def test_pages_beyond_the_pause_budget_are_saved_in_rounds(tmp_path: Path) -> None:
    """More pages were written than may be copied during the pause: a round before the pause saves most of them."""
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    words[:3000] += 1
    result = save(arena, tmp_path / "1", parent=tmp_path / "0", at_snapshot_point=MIB)
    assert (result.tracking, result.rounds, result.pages.data) == ("trace", 1, 3000)
    assert memoryview(memory_of(ImageFile(tmp_path / "1"))) == memoryview(arena)


def test_mode_stop_uses_the_trace(tmp_path: Path) -> None:
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    words[5, 3] = 1
    result = save(arena, tmp_path / "1", parent=tmp_path / "0", mode="stop")
    assert (result.tracking, result.tracked, result.pages.data) == ("trace", False, 1)
    assert memoryview(memory_of(ImageFile(tmp_path / "1"))) == memoryview(arena)


def test_traces_are_closed_with_their_arenas(tmp_path: Path) -> None:
    def descriptors() -> int:
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return sum(os.path.islink(link) and os.readlink(link) == "anon_inode:[userfaultfd]" for link in links)

    counts = []
    for number in range(3):
        arena = Arena(MIB)
        memoryview(arena)[:5] = b"ferry"
        save(arena, tmp_path / str(number), track=True)
        counts.append(descriptors())
        del arena
        gc.collect()
    assert counts[1] == counts[2]  # the first pass may close descriptors of earlier tests


def test_cancelled_checkpoint_leaves_no_trace(tmp_path: Path) -> None:
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    words[5] = 1

    async def cancelled() -> None:
        def listen(event: Event) -> None:
            if isinstance(event, events.InstantEvent):
                saving.cancel()

        saving = asyncio.ensure_future(
            pageferry.checkpoint_async(arena, tmp_path / "1", parent=tmp_path / "0", listener=listen)
        )
        with pytest.raises(asyncio.CancelledError):
            await saving

    asyncio.run(cancelled())
    assert not wp_registered(arena.address)
    result = save(arena, tmp_path / "1", parent=tmp_path / "0")
    assert result.tracking == "compare"
    assert memoryview(memory_of(ImageFile(tmp_path / "1"))) == memoryview(arena)


def test_bandwidth_limits_rounds(tmp_path: Path) -> None:
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    words[:2048] += 1
    begin = time.monotonic()
    result = save(arena, tmp_path / "1", parent=tmp_path / "0", at_snapshot_point=MIB, bandwidth=8 * MIB)
    assert time.monotonic() - begin > 0.9  # 8 MiB at 8 MiB/s; no wait follows the last block
    assert (result.tracking, result.rounds) == ("trace", 1)
    assert result.downtime < 500


def test_bandwidth_does_not_limit_pages_that_are_left_for_the_pause(tmp_path: Path) -> None:
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    words[:2048] += 1
    begin = time.monotonic()
    result = save(arena, tmp_path / "1", parent=tmp_path / "0", at_snapshot_point=16 * MIB, bandwidth=MIB)
    assert time.monotonic() - begin < 4
    assert (result.tracking, result.rounds) == ("trace", 0)


def test_limited_round_can_be_cancelled(tmp_path: Path) -> None:
    arena, words = filled()
    save(arena, tmp_path / "0", track=True)
    words[:] += 1

    async def run() -> float:
        task = asyncio.create_task(
            pageferry.checkpoint_async(
                arena, tmp_path / "1", parent=tmp_path / "0", at_snapshot_point=0, bandwidth=MIB // 2
            )
        )
        await asyncio.sleep(0.5)
        assert not task.done()
        begin = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - begin

    assert asyncio.run(run()) < 5
    assert not (tmp_path / "1").exists()
