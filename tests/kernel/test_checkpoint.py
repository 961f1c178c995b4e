"""Checkpoints of arenas: the image contains the memory at the snapshot point, at any write rate (S4)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import pageferry
from pageferry import _engine
from pageferry.checkpoints import events
from pageferry.demo.ledger import LedgerOptions, LedgerWorkload
from pageferry.errors import CheckpointError, ImageError, UsageError, WorkloadError
from pageferry.events import Event
from pageferry.images.image import ImageFile
from pageferry.workloads.arena.arena import Arena
from tests.kernel.programs import Program, wait_until
from tests.saved import check_ledger, ledger, memory_of, save

MIB = 1 << 20


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_image_holds_memory_of_the_snapshot_point(tmp_path: Path, codec: str, processes: int) -> None:
    with ledger(processes=processes) as workload:
        before = workload.writes()
        result = save(workload, tmp_path / "image", codec=codec)
        wait_until(lambda: workload.writes() > before + 1000, "the workload to run")
    image = check_ledger(tmp_path / "image")
    pages = result.pages
    assert sum(getattr(pages, name) for name in pages.__struct_fields__) == image.pages
    counts = image.image.count(0, image.pages)
    for name in ("absent", "zero", "pattern", "same_as", "data"):
        assert getattr(pages, name) == getattr(counts, name)
    assert counts.in_parent == 0
    assert result.bytes_written == os.stat(tmp_path / "image").st_size
    assert (result.digest, result.id) == (f"{image.image.digest:016x}", image.image.id.hex())
    assert image.metadata.regions[0].length == 32 * MIB


@pytest.mark.parametrize("seed", range(20))
def test_image_is_consistent_for_random_sizes(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    page_block = chance.choice([4096, 16384, 65536, 12288])
    options = LedgerOptions(
        threads=chance.randint(1, 4),
        seed=seed,
        zero_fraction=chance.random() / 2,
        working_set=chance.choice([0.05, 0.5, 1.0]),
        scatter=chance.random() < 0.5,
        fill=chance.choice([0.4, 1.0]),
        compressible=chance.random(),
    )
    sizes = {
        "trap_block": chance.choice([4096, 65536, 262144, 2 * MIB]),
        "page_block": page_block,
        "storage_block": page_block * chance.randint(1, 20),
        "staging": 4 * MIB,
        "bandwidth": chance.choice([0, 0, 40 * MIB]),
        "packers": chance.randint(1, 3),
        "codec": chance.choice(["none", "lz4", "zstd"]),
    }
    with ledger(16 * MIB, options, large_pages=chance.random() < 0.5) as workload:
        save(workload, tmp_path / "image", **sizes)
        save(workload, tmp_path / "child", parent=tmp_path / "image", **sizes)
    check_ledger(tmp_path / "image")
    check_ledger(tmp_path / "child")


def test_traps_save_pages_before_they_are_written(tmp_path: Path) -> None:
    """During a slow sweep, the workload continually writes to unsaved memory."""
    with ledger(16 * MIB) as workload:
        result = save(workload, tmp_path / "image", bandwidth=64 * MIB)
        assert result.traps > 0
    check_ledger(tmp_path / "image")


def test_chain_of_incremental_checkpoints_is_consistent(tmp_path: Path) -> None:
    options = LedgerOptions(threads=2, working_set=0.1, rate=8 * MIB)
    with ledger(16 * MIB, options) as workload:
        images = [tmp_path / f"image{number}" for number in range(10)]
        results = [
            save(workload, image, parent=parent) for parent, image in zip([None, *images[:-1]], images, strict=True)
        ]
    for image in images:
        check_ledger(image)
    assert all(later.bytes_written < results[0].bytes_written / 2 for later in results[1:])
    assert all(later.pages.in_parent > 0 for later in results[1:])
    pageferry.flatten_image(images[-1], tmp_path / "flat")
    check_ledger(tmp_path / "flat")


def test_damaged_pages_of_parent_are_stored_again(tmp_path: Path) -> None:
    """Pages that cannot be read from the parent are stored in the child."""
    with ledger(8 * MIB, LedgerOptions(working_set=0.01)) as workload:
        first = save(workload, tmp_path / "parent", codec="none")
        with open(tmp_path / "parent", "r+b") as file:
            file.seek(MIB)
            file.write(bytes(64 << 10))
        result = save(workload, tmp_path / "child", parent=tmp_path / "parent")
    assert 0 < result.pages.in_parent < first.pages.data
    image = ImageFile(tmp_path / "child")
    state = json.loads(image.state())
    assert _engine.Ledger.attach(memory_of(image), threads=0).digest() == state["digest"]


def test_mode_stop_keeps_workload_paused(tmp_path: Path) -> None:
    with ledger() as workload:
        result = save(workload, tmp_path / "image", mode="stop")
        assert result.traps == 0
        assert result.downtime_parts.save > 0
        writes = workload.writes()
        wait_until(lambda: workload.writes() > writes, "the workload to run")
    check_ledger(tmp_path / "image")


def test_mode_stop_ignores_the_bandwidth_limit(tmp_path: Path) -> None:
    with ledger(8 * MIB) as workload:
        result = save(workload, tmp_path / "image", mode="stop", bandwidth=MIB)
    assert result.downtime < 3000
    check_ledger(tmp_path / "image")


def test_zero_pattern_and_duplicate_pages_are_not_stored(tmp_path: Path) -> None:
    arena = Arena(64 * MIB)
    view = memoryview(arena)
    page = os.urandom(4096)
    view[0:4096] = page
    view[4096:8192] = b"ferries!" * 512
    view[8192:12288] = bytes(4096)
    view[32 * MIB : 32 * MIB + 4096] = page
    result = save(arena, tmp_path / "image")
    pages = result.pages
    assert (pages.data, pages.same_as, pages.pattern) == (1, 1, 1)
    image = ImageFile(tmp_path / "image")
    assert image.read(0, 3) == bytes(view[:12288])
    assert image.read(8192, 1) == page
    assert image.image.classes(0, 3) == bytes([4, 2, 1])
    assert image.image.classes(8192, 1) == bytes([3])


def test_checkpoint_does_not_fill_holes(tmp_path: Path) -> None:
    arena = Arena(256 * MIB, large_pages=False)
    memoryview(arena)[100 * MIB : 100 * MIB + 8192] = os.urandom(8192)
    before = os.fstat(arena.fileno()).st_blocks
    result = save(arena, tmp_path / "image")
    assert os.fstat(arena.fileno()).st_blocks == before == 16
    assert (result.pages.data, result.pages.absent) == (2, (256 * MIB >> 12) - 2)
    assert os.stat(tmp_path / "image").st_size < 2 * MIB


def test_large_pages_are_mapped_by_pmds_after_checkpoint(tmp_path: Path) -> None:
    with ledger(32 * MIB) as workload:
        if not any(workload.arena.large_units()):
            pytest.skip("no huge pages available")
        save(workload, tmp_path / "image")
        large = int(_smaps(workload.arena.address, "ShmemPmdMapped"))
        assert large >= 28 * MIB >> 10


def _smaps(address: int, field: str) -> str:
    with open("/proc/self/smaps") as smaps:
        lines = iter(smaps)
        for line in lines:
            if line.startswith(f"{address:x}-"):
                return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    raise AssertionError(f"nothing is mapped at {address:x}")


def test_image_is_replaced_only_by_a_complete_image(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with ledger(8 * MIB) as workload:
        first = save(workload, path)
        second = save(workload, path)
        assert first.id != second.id
        assert ImageFile(path).image.id.hex() == second.id
        assert os.listdir(tmp_path) == ["image"]
        with pytest.raises(UsageError, match="would replace an image in the chain of"):
            save(workload, path, parent=path)
    check_ledger(path)


def test_missing_and_mismatched_parents_are_refused(tmp_path: Path) -> None:
    with ledger(8 * MIB) as workload:
        with pytest.raises(ImageError):
            save(workload, tmp_path / "image", parent=tmp_path / "none")
        save(Arena(4 * MIB), tmp_path / "other")
        with pytest.raises(UsageError, match="as the parent: its regions are"):
            save(workload, tmp_path / "image", parent=tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["other"]


@pytest.mark.parametrize(
    "options",
    [{"trap_block": 5000}, {"trap_block": 12288}, {"page_block": 5000}, {"storage_block": 100}, {"staging": 1}],
)
def test_invalid_sizes_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        save(Arena(MIB), tmp_path / "image", **options)


def test_concurrent_checkpoint_is_refused_and_the_first_completes(tmp_path: Path) -> None:
    async def both(workload: LedgerWorkload) -> None:
        begun = asyncio.Event()

        def listen(event: Event) -> None:
            if isinstance(event, events.InstantEvent):
                begun.set()

        first = asyncio.create_task(
            pageferry.checkpoint_async(workload, tmp_path / "first", bandwidth=8 * MIB, listener=listen)
        )
        await begun.wait()
        with pytest.raises(WorkloadError, match="registered with another userfaultfd"):
            await pageferry.checkpoint_async(workload, tmp_path / "second")
        await first

    with ledger(8 * MIB, LedgerOptions(working_set=0.05)) as workload:
        asyncio.run(both(workload))
    check_ledger(tmp_path / "first")
    assert os.listdir(tmp_path) == ["first"]


def test_checkpoint_command_saves_chain_and_reports_json(tmp_path: Path) -> None:
    setup = {"name": "saved", "size": 16 * MIB, "options": {"threads": 2}, "exact": True}
    with Program("-m", "pageferry.demo.process", json.dumps(setup)) as program:
        program.json()
        command = [
            sys.executable,
            "-m",
            "pageferry",
            "checkpoint",
            "saved",
            str(tmp_path / "image"),
            "--output",
            "json",
        ]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["type"] for line in lines if line["type"] != "checkpoint-progress"] == [
            "armed",
            "snapshot-point",
            "checkpoint",
        ]
        result = lines[-1]
        assert result["status"] == "completed"
        assert result["downtime"] == result["downtime-parts"]["total"] > 0
        wanted = {"total-time", "pages", "bytes-written", "writes", "traps", "compression"}
        assert wanted < result.keys()
        command = [sys.executable, "-m", "pageferry", "checkpoint", "saved", str(tmp_path / "child")]
        done = subprocess.run(
            [*command, "--parent", str(tmp_path / "image"), "--codec", "zstd"],
            capture_output=True,
            check=True,
            timeout=60,
        )
        assert b"completed" in done.stdout
    check_ledger(tmp_path / "image")
    check_ledger(tmp_path / "child")


def test_thread_that_holds_the_gil_may_trap(tmp_path: Path) -> None:
    """The threads that serve traps do not need the GIL, which the trapped thread holds."""
    arena = Arena(32 * MIB)
    view = memoryview(arena)
    view[:] = os.urandom(32 * MIB)
    parked, stop = threading.Event(), threading.Event()
    may_run = threading.Event()
    may_run.set()

    def write() -> None:
        position = 0
        while not stop.is_set():
            if not may_run.is_set():
                parked.set()
                may_run.wait()
            position = (position + 70_001) % (32 * MIB)
            view[position] = 1

    def pause() -> None:
        parked.clear()
        may_run.clear()
        assert parked.wait(20)

    arena.control.on_pause, arena.control.on_resume = pause, may_run.set
    saved: list[bytes] = []

    def look() -> bytes:
        saved.append(hashlib.sha256(view).digest())
        return b""

    arena.control.save = look
    writer = threading.Thread(target=write)
    writer.start()
    try:
        result = save(arena, tmp_path / "image", staging=256 << 10, bandwidth=64 * MIB)
    finally:
        stop.set()
        may_run.set()
        writer.join()
    assert result.traps > 0
    assert [hashlib.sha256(memory_of(ImageFile(tmp_path / "image"))).digest()] == saved


@pytest.mark.parametrize("then_written", [False, True])
def test_discard_during_checkpoint_is_an_error(tmp_path: Path, then_written: bool) -> None:
    """A discard does not trap, so the contents at the snapshot point are lost."""
    arena = Arena(16 * MIB, large_pages=False)
    memoryview(arena)[:] = os.urandom(16 * MIB)

    def give_back(event: Event) -> None:
        if isinstance(event, events.InstantEvent):
            file = f"/proc/{os.getpid()}/fd/{arena.fileno()}"
            hole = ("--punch-hole", "--offset", str(12 * MIB), "--length", "4096")
            subprocess.run(["fallocate", *hole, "-n", file], check=True)
            if then_written:
                memoryview(arena)[12 * MIB] = 1

    async def run() -> None:
        await pageferry.checkpoint_async(arena, tmp_path / "image", bandwidth=8 * MIB, listener=give_back)

    with pytest.raises(CheckpointError, match="memory was discarded"):
        asyncio.run(run())
    assert os.listdir(tmp_path) == []


USER = """
import asyncio, concurrent.futures.thread, ctypes, os, sys
import pageferry.checkpoints.save, pageferry.memory.view, pageferry.memory.mappers
from pageferry.errors import WorkloadError
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, without which root would own the process's /proc files
arena = pageferry.Arena(1 << 20)
memoryview(arena)[:5] = b"ferry"
try:
    pageferry.checkpoint(arena, sys.argv[1] + "/lazy")
except WorkloadError as refused:
    print(refused)
pageferry.checkpoint(arena, sys.argv[1] + "/stop", mode="stop")
"""


def test_lazy_checkpoint_is_refused_to_user_without_kernel_faults(root: None) -> None:
    switch = Path("/proc/sys/vm/unprivileged_userfaultfd")
    if switch.read_text().strip() != "0":
        pytest.skip("every user may create a userfaultfd on this host")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        # The program imports its dependencies before it changes to a user that may be unable to read this checkout.
        environment = os.environ | {"PAGEFERRY_RUN_DIR": f"{folder}/run"}
        done = subprocess.run([sys.executable, "-c", USER, folder], capture_output=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr
        assert b"vm.unprivileged_userfaultfd=1" in done.stdout
        assert os.listdir(folder) == ["stop"]
