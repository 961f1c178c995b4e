"""Direct I/O into arenas, through pinned pages: no read is lost, whenever the read starts or completes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import pageferry
from pageferry.checkpoints.events import CheckpointResult
from pageferry.errors import UsageError
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.migration import switchover_request
from pageferry.workloads.open import open_workload
from tests.kernel import moving
from tests.kernel.direct_reader import AT, LENGTH
from tests.kernel.programs import Program
from tests.slow_disk import HELD, SlowDisk, contents, slow_disk

pytestmark = pytest.mark.usefixtures("root")

READER = "tests.kernel.direct_reader"
MEANS = ["thread", "ring", "fixed"]


@contextmanager
def reading(tmp_path: Path, means: str, *pages: str) -> Iterator[tuple[Program, SlowDisk]]:
    """Yield a program with the arena `here`, and the slow disk from which the program reads."""
    with (
        slow_disk(tmp_path / "mounted") as disk,
        Program("-m", READER, "source", "here", str(disk.path), means, *pages) as program,
    ):
        assert program.line() == "ready"
        yield program, disk


def begin(program: Program, disk: SlowDisk) -> None:
    """Start a read, and wait until the disk has received the request."""
    program.say("read")
    disk.held()


@pytest.mark.parametrize("means", MEANS)
def test_read_started_before_the_trace_is_not_lost(tmp_path: Path, means: str) -> None:
    with reading(tmp_path, means) as (program, disk), Program("-m", READER, "destination") as there:
        begin(program, disk)
        with moving.migrating("here", there.line()) as migration:
            moving.until(migration, "setup")
            time.sleep(0.5)
            disk.answer()
            result = moving.until(migration, "migration")
            assert there.line() == "fresh"
            assert result["direct-io"]["drains"] >= 1


@pytest.mark.parametrize("means", MEANS)
def test_read_started_during_a_round_is_not_lost(tmp_path: Path, means: str) -> None:
    with reading(tmp_path, means) as (program, disk), Program("-m", READER, "destination") as there:
        migration = moving.migrating("here", there.line(), fault="source.between-rounds=stop")
        with migration:
            moving.until(migration, "setup")
            moving.stopped(migration)
            begin(program, disk)
            migration.process.send_signal(signal.SIGCONT)
            time.sleep(0.5)
            disk.answer()
            moving.until(migration, "migration")
            assert there.line() == "fresh"


@pytest.mark.parametrize("means", ["thread", "ring"])
def test_read_in_flight_at_the_switch_to_postcopy_is_not_lost(tmp_path: Path, means: str) -> None:
    with reading(tmp_path, means) as (program, disk), Program("-m", READER, "late-destination") as there:
        options = ("--mode", "hybrid", "--max-downtime", "0")
        migration = moving.migrating("here", there.line(), *options, fault="source.between-rounds=stop")
        with migration:
            moving.until(migration, "setup")
            moving.stopped(migration)
            begin(program, disk)  # the first collection marks the pages of the read, and round 2 sends them
            migration.process.send_signal(signal.SIGCONT)
            moving.until(migration, "round")
            time.sleep(0.5)
            with suppress(UsageError):  # raised if the migration has left its rounds without waiting for the read
                switchover_request.request(Registry().folder("here"))
            disk.answer()
            result = moving.until(migration, "migration")
            assert there.line() == "fresh"
            assert result["postcopy"] is not None


def test_read_into_registered_buffer_before_the_pause_is_not_lost(tmp_path: Path) -> None:
    """The trace does not report the read, because the pages were pinned before the trace was installed."""
    with reading(tmp_path, "fixed") as (program, disk), Program("-m", READER, "destination") as there:
        migration = moving.migrating("here", there.line(), fault="source.between-rounds=stop")
        with migration:
            moving.until(migration, "setup")
            moving.stopped(migration)
            begin(program, disk)
            disk.answer()
            assert program.line().startswith("read ")
            migration.process.send_signal(signal.SIGCONT)
            result = moving.until(migration, "migration")
            assert there.line() == "fresh"
            assert result["direct-io"]["pinned-pages"] == 16


def test_program_declared_without_direct_io_is_paused_once(tmp_path: Path) -> None:
    with moving.ledger("here") as program, moving.receiver("there") as there:
        with moving.migrating("here", moving.address_of(there)) as migration:
            assert moving.until(migration, "migration")["direct-io"]["drains"] == 0
        assert moving.until(program, "ledger")["intact"]


def saved(path: Path, after: Callable[[], None] | None = None, **options: Any) -> CheckpointResult:
    """Save the arena from this process, and return the result. Call `after` 0.5 s after the start of the checkpoint."""

    async def save() -> CheckpointResult:
        arena = await open_workload("here")
        try:
            return await pageferry.checkpoint_async(arena, path, **options)
        finally:
            arena.close()

    timer = threading.Timer(0.5, after) if after is not None else None
    if timer is not None:
        timer.start()
    result = asyncio.run(save())
    if timer is not None:
        timer.join()
    return result


def buffer_in(path: Path) -> str:
    image = ImageFile(path)
    held = image.read(AT // 4096, LENGTH // 4096)
    return "fresh" if held == contents(HELD, LENGTH) else "stale"


@pytest.mark.parametrize("means", ["thread", "ring"])
def test_checkpoint_in_rounds_during_a_read_is_consistent(tmp_path: Path, means: str) -> None:
    with reading(tmp_path, means) as (program, disk):
        assert saved(tmp_path / "0", track=True).tracked
        begin(program, disk)
        result = saved(tmp_path / "1", disk.answer, parent=tmp_path / "0", at_snapshot_point=0)
        assert (result.tracking, result.tracked) == ("trace", True), result.tracking_note
        assert buffer_in(tmp_path / "1") == "fresh"
        assert result.drains >= 1
        after = saved(tmp_path / "2", parent=tmp_path / "1")
        assert (after.tracking, buffer_in(tmp_path / "2")) == ("trace", "fresh")


def test_first_traced_checkpoint_during_a_read_is_consistent(tmp_path: Path) -> None:
    with reading(tmp_path, "thread") as (program, disk):
        begin(program, disk)
        assert saved(tmp_path / "0", disk.answer, track=True).tracked
        assert buffer_in(tmp_path / "0") == "fresh"


def test_pinned_memory_is_saved_during_the_pause(tmp_path: Path) -> None:
    """The checkpoint is incremental. The trace since the parent does not report reads into a registered buffer."""
    with reading(tmp_path, "fixed") as (program, disk):
        saved(tmp_path / "0", track=True)
        begin(program, disk)
        disk.answer()
        assert program.line().startswith("read ")
        result = saved(tmp_path / "1", parent=tmp_path / "0")
        assert buffer_in(tmp_path / "1") == "fresh"
        assert (result.mode, result.tracking, result.tracked) == ("stop", "compare", False)


@pytest.mark.parametrize("means", MEANS)
def test_read_into_memory_during_reclaim_is_not_lost(tmp_path: Path, means: str) -> None:
    with reading(tmp_path, means) as (program, disk):
        if means != "fixed":  # the read is in flight before the first pause
            begin(program, disk)
        options = ("--sample", "100%", "--rounds", "1", "--budget", "0", "--window", "50ms")
        timer = threading.Timer(0.5, disk.answer)
        timer.start()
        command("large-pages", "here", "--reclaim", "store", *options)
        timer.join()
        if means == "fixed":  # the buffer is pinned permanently, so the read may start after the reclaim
            begin(program, disk)
            disk.answer()
        assert program.line().startswith("read ")
        program.say("look")
        assert program.line() == "fresh"


def test_zeros_in_registered_buffer_are_not_discarded(tmp_path: Path) -> None:
    with reading(tmp_path, "fixed", "base-pages") as (program, disk):
        program.say("clear")
        assert program.line() == "cleared"
        command("sharing", "here", "--apply", "--threshold", "1", "--break-hot")
        begin(program, disk)
        disk.answer()
        assert program.line().startswith("read ")
        program.say("look")
        assert program.line() == "fresh"


def command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pageferry", *words], check=True, timeout=60, capture_output=True)
