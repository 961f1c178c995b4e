"""Cold store (S3): evicted pages are freed, and reloaded on demand or all at once. No write is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pageferry import sharing
from pageferry.host.cpu_quota import mounts
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.pager import client, records
from pageferry.pager.records import Deferred
from pageferry.workloads.open import open_workload
from tests.kernel.moving import MIB, address_of, environment, receiver, stopped
from tests.kernel.programs import Program, wait_until
from tests.saved import check_ledger

pytestmark = pytest.mark.usefixtures("root")

SIZE = 64 * MIB
OPTIONS = {"threads": 2, "zero_fraction": 0.2, "working_set": 0.1, "rate": 64 * MIB}
EVERYTHING = ("--sample", "100%", "--rounds", "1", "--budget", "0", "--window", "50ms")


def pageferry(*arguments: str, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pageferry", *arguments, "--output", "json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(fault))


def reclaim(*options: str) -> dict[str, Any]:
    """Evict cold pages of the workload `cold` to a store, and return the result."""
    done = pageferry("large-pages", "cold", "--reclaim", "store", *EVERYTHING, *options)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def undo() -> int:
    """Reload all pages from the store, and return the number of bytes reloaded."""
    done = pageferry("large-pages", "cold", "--undo")
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["reloaded"])


def resident() -> int:
    """Return the number of bytes allocated for the arena's file."""

    async def look() -> int:
        workload = await open_workload("cold")
        try:
            return os.fstat(workload.regions[0].fd).st_blocks * 512
        finally:
            workload.close()

    return asyncio.run(look())


def record() -> Deferred | None:
    return Registry().folder("cold").load(records.RECORD, Deferred)


def traps(pid: int) -> int:
    """Return the number of mappings of a process that are registered with a userfaultfd."""
    return sum(
        bool({"um", "uw", "ui"} & set(line.split()[1:]))
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines()
        if line.startswith("VmFlags")
    )


def kill_pager() -> None:
    status = client.status(Registry().folder("cold"))
    assert status is not None
    os.kill(status.pager, signal.SIGKILL)


@contextmanager
def ledger(**setup: Any) -> Iterator[Program]:
    """Run a ledger on huge pages as the workload `cold`. After the block, stop it and check that it is intact."""
    setup = {"name": "cold", "size": SIZE, "exact": True, "options": OPTIONS} | setup
    with Program("-m", "pageferry.demo.process", json.dumps(setup)) as program:
        program.json()
        yield program
        program.process.send_signal(signal.SIGTERM)
        said = program.json()
        assert said["intact"], said
        assert program.wait() == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_cold_pages_are_evicted_and_reloaded(processes: int) -> None:
    with ledger(processes=processes) as workload:
        before = resident()
        done = reclaim()
        cold = sum(512 - sample["activity"] for sample in done["samples"] if sample["activity"] <= 64) * 4096
        assert done["broken"] >= 20
        assert done["reclaimed"] >= 0.95 * cold
        assert before - resident() >= 0.9 * done["reclaimed"], "resident memory must decrease"
        assert done["store"]["pages"] * 4096 >= done["reclaimed"]
        assert undo() >= 0.5 * done["reclaimed"]
        assert resident() >= 0.99 * before
        wait_until(lambda: traps(workload.process.pid) == 0, "the removal of the traps")
        assert record() is None
        assert not list(Registry().folder("cold").path.glob("*.img"))
        again = pageferry("large-pages", "cold", "--undo")
        assert again.returncode == 2
        assert "none of it is in a store" in again.stderr


@pytest.mark.alone  # requires free huge pages
def test_large_mappings_are_restored_with_the_pages() -> None:
    with ledger():
        whole = len(reclaim("--threshold", "0")["samples"])
        undo()
        assert len(reclaim("--threshold", "0")["samples"]) >= 0.9 * whole


def test_second_reclaim_builds_on_the_first(tmp_path: Path) -> None:
    half = ("--sample", "50%", "--store", str(tmp_path))
    with ledger():
        first, second = reclaim(*half), reclaim(*half)
        assert first["reclaimed"] > 0
        assert second["reclaimed"] > 0
        kept = record()
        assert kept is not None
        image = ImageFile(kept.image)
        assert [str(link.path) for link in image.links] == [second["store"]["path"], first["store"]["path"]]
        assert image.verify() == []
        assert undo() > first["reclaimed"]
        assert os.listdir(tmp_path) == []


def test_heavy_writer_loses_no_write() -> None:
    hammering = {"threads": 2, "zero_fraction": 0.2, "working_set": 1.0, "rate": None}
    with ledger(options=hammering):
        for _ in range(3):
            done = reclaim("--threshold", "512")
            assert done["store"]["written"] + done["store"]["pages"] > 0
            if record() is not None:
                pageferry("large-pages", "cold", "--undo")


def test_workload_with_cold_store_can_be_saved_and_peeked(tmp_path: Path) -> None:
    with ledger():
        reclaim()
        assert pageferry("peek", "cold", "0", "4096").returncode == 0
        status = client.status(Registry().folder("cold"))
        assert status is not None
        assert status.deferred > 0
        assert json.loads(pageferry("list").stdout.splitlines()[0])["deferred"] == status.deferred
        saved = pageferry("checkpoint", "cold", str(tmp_path / "image"))
        assert saved.returncode == 0, saved.stderr
        check_ledger(tmp_path / "image")


def test_workload_with_cold_store_can_be_migrated() -> None:
    setup = {"name": "cold", "size": SIZE, "options": OPTIONS}
    with Program("-m", "pageferry.demo.process", json.dumps(setup)) as workload:
        workload.json()
        reclaim()
        with receiver("there") as there:
            moved = pageferry("migrate", "cold", address_of(there))
            assert moved.returncode == 0, moved.stderr
            assert workload.json()["intact"]
            there.process.send_signal(signal.SIGTERM)


def test_another_pager_takes_over() -> None:
    with ledger():
        reclaim()
        kill_pager()
        wait_until(
            lambda: pageferry("large-pages", "cold", "--undo").returncode == 32, "the missing pager to be detected"
        )
        taken = pageferry("restore", "cold", "--takeover")
        assert taken.returncode == 0, taken.stderr
        assert undo() > 0


def test_takeover_with_another_image_is_refused(tmp_path: Path) -> None:
    with ledger():
        assert pageferry("checkpoint", "cold", str(tmp_path / "other")).returncode == 0
        reclaim()
        kill_pager()
        refused = pageferry("restore", "cold", str(tmp_path / "other"), "--takeover")
        assert refused.returncode == 32
        assert "the restore was started with id" in refused.stderr
        assert pageferry("restore", "cold", "--takeover").returncode == 0
        assert undo() > 0
        wait_until(lambda: record() is None, "the removal of the cold store")
        assert (tmp_path / "other").exists()


def test_takeover_with_another_image_in_place_of_the_store_is_refused(tmp_path: Path) -> None:
    with ledger():
        assert pageferry("checkpoint", "cold", str(tmp_path / "other")).returncode == 0
        store = Path(reclaim("--store", str(tmp_path))["store"]["path"])
        kill_pager()
        store.rename(tmp_path / "kept")
        (tmp_path / "other").rename(store)
        refused = pageferry("restore", "cold", "--takeover")
        assert refused.returncode == 32
        assert "the restore was started with id" in refused.stderr
        assert pageferry("restore", "cold", str(tmp_path / "kept"), "--takeover").returncode == 0
        assert undo() > 0
        wait_until(lambda: record() is None, "the removal of the cold store")
        assert store.exists(), "the pager removed an image of the user"


def test_pager_does_not_remove_a_copy_of_the_store(tmp_path: Path) -> None:
    with ledger():
        store = Path(reclaim("--store", str(tmp_path))["store"]["path"])
        kill_pager()
        shutil.copy(store, tmp_path / "copy")
        assert pageferry("restore", "cold", str(tmp_path / "copy"), "--takeover").returncode == 0
        assert undo() > 0
        wait_until(lambda: not store.exists(), "the removal of the store")
        assert (tmp_path / "copy").exists()


@pytest.fixture
def group() -> Iterator[Path]:
    """Yield the directory of a new memory control group. Skip the test if no group can be created."""
    for mount in mounts():
        if mount.version == 2 or "memory" in mount.controllers:
            made = mount.point / f"pageferry-test-{os.getpid()}"
            try:
                made.mkdir()
            except OSError:
                continue
            yield made
            members = made / "cgroup.procs"
            wait_until(lambda members=members: not members.read_text(), "the exit of all processes of the group")
            made.rmdir()
            return
    pytest.skip("cannot create a control group")


def test_pager_is_in_the_control_group_of_the_workload(group: Path) -> None:
    """A pager that takes over joins the group, too, so that reloaded pages are charged to the group of the workload."""

    def members() -> list[int]:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]

    def pager() -> int:
        status = client.status(Registry().folder("cold"))
        assert status is not None
        return status.pager

    with ledger() as workload:
        (group / "cgroup.procs").write_text(str(workload.process.pid))
        reclaim()
        assert pager() in members()
        kill_pager()
        assert pageferry("restore", "cold", "--takeover").returncode == 0
        assert pager() in members()
        undo()


@pytest.mark.parametrize("point", ["stored", "paused", "evicted", "handed-over"])
def test_reclaim_killed_at_fault_point_loses_no_write(point: str) -> None:
    """A pager that was started before the fault point keeps running without the killed command."""
    with ledger():
        done = pageferry("large-pages", "cold", "--reclaim", "store", *EVERYTHING, fault=f"reclaim.{point}=kill")
        assert done.returncode == -9
        if record() is not None:
            # Exit code 2: the pager has already reloaded all pages.
            wait_until(lambda: pageferry("large-pages", "cold", "--undo").returncode in (0, 2), "the store's removal")
        reclaim()  # evicts the units that are still huge pages
        orphans = set(Registry().folder("cold").path.glob("*.img"))
        kept = record()
        assert orphans == ({link.path for link in ImageFile(kept.image).links} if kept else set())


def test_reclaim_killed_at_random_time_loses_no_write() -> None:
    chance = random.Random(7)
    with ledger():
        for _ in range(5):
            command = ("-m", "pageferry", "large-pages", "cold", "--reclaim", "store", *EVERYTHING)
            with Program(*command) as reclaiming:
                time.sleep(0.4 + chance.random())
                reclaiming.kill()
            if record() is not None:
                pageferry("restore", "cold", "--takeover")
                pageferry("large-pages", "cold", "--undo")
        wait_until(lambda: record() is None, "the removal of the cold store")


def test_damaged_store_is_an_error_and_never_zeros() -> None:
    with ledger(options=OPTIONS | {"rate": MIB}) as workload:
        reclaim()
        kept = record()
        assert kept is not None
        path = Path(kept.image)
        good = path.read_bytes()
        with open(path, "r+b") as file:
            file.seek(4096)
            file.write(bytes(len(good) // 2))
        failed = pageferry("large-pages", "cold", "--undo")
        assert failed.returncode not in (0, 2)
        assert str(path) in failed.stderr
        path.write_bytes(good)
        undo()
        assert workload.process.poll() is None


def test_partly_reloaded_large_page_is_not_mapped_by_a_pmd() -> None:
    """The first page is reloaded into a new huge page whose other base pages are not loaded yet."""
    reclaiming = ("large-pages", "cold", "--reclaim", "store", *EVERYTHING)
    with Program(str(Path(__file__).with_name("cold_parent.py"))) as parent:
        parent.json()
        with Program("-m", "pageferry", *reclaiming, env=environment("reclaim.handed-over=stop")) as reclaimer:
            stopped(reclaimer)
            parent.say("touch")
            assert parent.json() == {"touched": 8}
            reclaimer.process.send_signal(signal.SIGCONT)
            assert reclaimer.wait() == 0
        parent.say("look")
        assert parent.json() == {"right": True}


def test_forked_child_reads_evicted_pages() -> None:
    with Program(str(Path(__file__).with_name("cold_parent.py"))) as parent:
        parent.json()
        reclaim()
        parent.say("fork")
        assert parent.json() == {"right": True}


def test_store_for_unmanaged_process_or_unwritable_folder_is_refused(tmp_path: Path) -> None:
    with ledger() as workload:
        stranger = pageferry("large-pages", f"pid:{workload.process.pid}", "--reclaim", "store", *EVERYTHING)
        assert stranger.returncode == 3
        assert "not a managed workload" in stranger.stderr
        missing = pageferry("large-pages", "cold", "--reclaim", "store", "--store", str(tmp_path / "none"), *EVERYTHING)
        assert missing.returncode == 2


def test_sharing_skips_pages_in_the_cold_store() -> None:
    """Pages in the store are neither scanned nor loaded. Resident zero pages are discarded."""
    with ledger():
        reclaim()
        folder = Registry().folder("cold")
        before = client.status(folder)
        assert before is not None
        found = sharing.find(["cold"], threshold=64)
        after = client.status(folder)
        assert after is not None
        assert found.deferred == 0
        assert any("cold store" in note for note in found.not_shareable)
        # Accesses of the ledger may have reloaded pages, and the pager does not read its counters atomically.
        assert after.loaded - before.loaded <= 16 * (after.missed - before.missed + 8)
        for _ in range(3):
            sharing.share(["cold"], threshold=1)
        assert record() is not None
        undo()


TWINS = """
import hashlib, os, random, sys
import pageferry
arena = pageferry.Arena(32 << 20, "cold", on_pause=lambda: None)
memory = memoryview(arena)
for page in range(0, len(memory), 4096):
    memory[page : page + 4096] = random.Random(page // 4096 % 50).randbytes(4096)
print("ready", flush=True)
for line in sys.stdin:
    print(hashlib.sha256(memory).hexdigest(), flush=True)
"""


def test_duplicate_cold_pages_are_stored_once() -> None:
    """8,192 pages with 50 different contents are stored as 50 pages, and are reloaded with the correct contents."""
    with Program("-c", TWINS) as program:
        assert program.line() == "ready"
        program.say("hash")
        content, before = program.line(), resident()
        done = reclaim()
        stored = done["store"]
        assert (done["broken"], stored["pages"], stored["equal"]) == (16, 8192, 8192 - 50)
        assert stored["bytes"] < 8192 * (16 + 4) + 50 * 4096 + 64 * 1024, (
            "the store is larger than its page map and 50 incompressible pages"
        )
        assert before - resident() == done["reclaimed"] == 32 * MIB
        program.say("hash")
        assert program.line() == content
        assert reclaim()["store"]["equal"] == 8192 - 50
        assert undo() == 32 * MIB
        program.say("hash")
        assert program.line() == content
