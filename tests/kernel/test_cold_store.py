"""Cold pages in a store (S3): they leave memory, come back on access or all together, and no write is ever lost."""

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
from pageferry.workloads import deferred
from pageferry.workloads.deferred import Deferred
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
    """Send what is cold to a store; what was said at the end."""
    done = pageferry("large-pages", "cold", "--reclaim", "store", *EVERYTHING, *options)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def undo() -> int:
    """Bring all back; the bytes that were in the store."""
    done = pageferry("large-pages", "cold", "--undo")
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["brought-back"])


def resident() -> int:
    """Bytes of the arena's file that are in memory."""

    async def look() -> int:
        workload = await open_workload("cold")
        try:
            return os.fstat(workload.regions[0].fd).st_blocks * 512
        finally:
            workload.close()

    return asyncio.run(look())


def record() -> Deferred | None:
    return Registry().folder("cold").load(deferred.RECORD, Deferred)


def traps(pid: int) -> int:
    """Mappings of a process that are registered with a userfaultfd."""
    return sum(
        bool({"um", "uw", "ui"} & set(line.split()[1:]))
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines()
        if line.startswith("VmFlags")
    )


def kill_pager() -> None:
    status = deferred.status(Registry().folder("cold"))
    assert status is not None
    os.kill(status.pager, signal.SIGKILL)


@contextmanager
def ledger(**setup: Any) -> Iterator[Program]:
    """A ledger on large pages, which must be intact at the end and have written all the time."""
    setup = {"name": "cold", "size": SIZE, "exact": True, "options": OPTIONS} | setup
    with Program("-m", "pageferry.workloads.ledger_process", json.dumps(setup)) as program:
        program.json()
        yield program
        program.process.send_signal(signal.SIGTERM)
        said = program.json()
        assert said["intact"], said
        assert program.wait() == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_cold_leaves_memory_and_comes_back(processes: int) -> None:
    with ledger(processes=processes) as workload:
        before = resident()
        done = reclaim()
        cold = sum(512 - sample["activity"] for sample in done["samples"] if sample["activity"] <= 64) * 4096
        assert done["broken"] >= 20
        assert done["reclaimed"] >= 0.95 * cold
        assert before - resident() >= 0.9 * done["reclaimed"], "the workload itself says so"
        assert done["store"]["pages"] * 4096 >= done["reclaimed"]
        assert undo() >= 0.5 * done["reclaimed"]
        assert resident() >= 0.99 * before
        wait_until(lambda: traps(workload.process.pid) == 0, "the end of the traps")
        assert record() is None
        assert not list(Registry().folder("cold").path.glob("*.img"))
        again = pageferry("large-pages", "cold", "--undo")
        assert again.returncode == 2
        assert "nothing to undo" in again.stderr


def test_large_mappings_come_back_with_the_pages() -> None:
    with ledger():
        whole = len(reclaim("--threshold", "0")["samples"])
        undo()
        assert len(reclaim("--threshold", "0")["samples"]) >= 0.9 * whole


def test_a_second_reclaim_builds_on_the_first(tmp_path: Path) -> None:
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


def test_a_workload_that_hammers_all_pages_loses_no_write() -> None:
    hammering = {"threads": 2, "zero_fraction": 0.2, "working_set": 1.0, "rate": None}
    with ledger(options=hammering):
        for _ in range(3):
            done = reclaim("--threshold", "512")
            assert done["store"]["written"] + done["store"]["pages"] > 0
            if record() is not None:
                pageferry("large-pages", "cold", "--undo")


def test_it_can_be_saved_and_looked_at(tmp_path: Path) -> None:
    with ledger():
        reclaim()
        assert pageferry("peek", "cold", "0", "4096").returncode == 0
        status = deferred.status(Registry().folder("cold"))
        assert status is not None
        assert status.deferred > 0
        assert json.loads(pageferry("list").stdout.splitlines()[0])["deferred"] == status.deferred
        saved = pageferry("checkpoint", "cold", str(tmp_path / "image"))
        assert saved.returncode == 0, saved.stderr
        check_ledger(tmp_path / "image")


def test_it_can_be_migrated() -> None:
    setup = {"name": "cold", "size": SIZE, "options": OPTIONS}
    with Program("-m", "pageferry.workloads.ledger_process", json.dumps(setup)) as workload:
        workload.json()
        reclaim()
        with receiver("there") as there:
            moved = pageferry("migrate", "cold", address_of(there))
            assert moved.returncode == 0, moved.stderr
            assert workload.json()["intact"]
            there.process.send_signal(signal.SIGTERM)


def test_another_pager_goes_on() -> None:
    with ledger():
        reclaim()
        kill_pager()
        wait_until(lambda: pageferry("large-pages", "cold", "--undo").returncode == 32, "a pager that is missed")
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
        assert "it is another image" in refused.stderr
        assert pageferry("restore", "cold", "--takeover").returncode == 0
        assert undo() > 0
        wait_until(lambda: record() is None, "the end of the store")
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
        assert "it is another image" in refused.stderr
        assert pageferry("restore", "cold", str(tmp_path / "kept"), "--takeover").returncode == 0
        assert undo() > 0
        wait_until(lambda: record() is None, "the end of the store")
        assert store.exists(), "an image of the user's took its place"


def test_pager_of_a_cold_store_removes_no_copy_of_it(tmp_path: Path) -> None:
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
    """A memory control group."""
    for mount in mounts():
        if mount.version == 2 or "memory" in mount.controllers:
            made = mount.point / f"pageferry-test-{os.getpid()}"
            try:
                made.mkdir()
            except OSError:
                continue
            yield made
            members = made / "cgroup.procs"
            wait_until(lambda members=members: not members.read_text(), "the end of all processes of the group")
            made.rmdir()
            return
    pytest.skip("cannot create a control group")


def test_pager_is_in_the_control_group_of_the_workload(group: Path) -> None:
    """Also one that takes over from another group: what it brings back is charged to the workload."""

    def members() -> list[int]:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]

    def pager() -> int:
        status = deferred.status(Registry().folder("cold"))
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


@pytest.mark.parametrize("point", ["stored", "paused", "evicted", "handover"])
def test_killed_at_a_point(point: str) -> None:
    with ledger():
        done = pageferry("large-pages", "cold", "--reclaim", "store", *EVERYTHING, fault=f"reclaim.{point}=kill")
        assert done.returncode == -9
        if record() is not None:
            taken = pageferry("restore", "cold", "--takeover")
            assert taken.returncode == 0, taken.stderr
            # 2: the pager has brought everything meanwhile, and there is nothing to undo.
            wait_until(lambda: pageferry("large-pages", "cold", "--undo").returncode in (0, 2), "the end of the store")
        reclaim()  # of what is still mapped as large pages
        orphans = set(Registry().folder("cold").path.glob("*.img"))
        kept = record()
        assert orphans == ({link.path for link in ImageFile(kept.image).links} if kept else set())


def test_killed_at_any_moment() -> None:
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
        wait_until(lambda: record() is None, "the end of the store")


def test_a_damaged_store_is_told_and_never_zeros() -> None:
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


def test_a_large_page_that_has_gone_whole_is_not_mapped_whole_when_its_first_page_is_back() -> None:
    """It stands on a large page again then, which is empty but for that page."""
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


def test_a_child_that_is_forked_has_no_zeros_for_pages() -> None:
    with Program(str(Path(__file__).with_name("cold_parent.py"))) as parent:
        parent.json()
        reclaim()
        parent.say("fork")
        assert parent.json() == {"right": True}


def test_no_store_for_any_process_and_none_where_it_cannot_be_written(tmp_path: Path) -> None:
    with ledger() as workload:
        stranger = pageferry("large-pages", f"pid:{workload.process.pid}", "--reclaim", "store", *EVERYTHING)
        assert stranger.returncode == 3
        assert "no managed workload" in stranger.stderr
        missing = pageferry("large-pages", "cold", "--reclaim", "store", "--store", str(tmp_path / "none"), *EVERYTHING)
        assert missing.returncode == 2


def test_sharing_leaves_alone_what_is_in_a_store() -> None:
    """It is not looked at, does not come, and zeros are given back beside it."""
    with ledger():
        reclaim()
        folder = Registry().folder("cold")
        before = deferred.status(folder)
        assert before is not None
        found = asyncio.run(sharing.find(["cold"], threshold=64))
        after = deferred.status(folder)
        assert after is not None
        assert found.deferred == 0
        assert any("cold store" in note for note in found.not_shareable)
        # What the ledger itself has accessed meanwhile may have come; the counters are not of one instant.
        assert after.loaded - before.loaded <= 16 * (after.missed - before.missed + 8)
        for _ in range(3):
            asyncio.run(sharing.share(["cold"], threshold=1))
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


def test_equal_cold_pages_are_stored_once() -> None:
    """Of 8,192 pages that have 50 contents between them, the store holds 50; each comes back as it was, and apart."""
    with Program("-c", TWINS) as program:
        assert program.line() == "ready"
        program.say("hash")
        content, before = program.line(), resident()
        done = reclaim()
        stored = done["store"]
        assert (done["broken"], stored["pages"], stored["equal"]) == (16, 8192, 8192 - 50)
        assert stored["bytes"] < 8192 * (16 + 4) + 50 * 4096 + 64 * 1024, (
            "the page map, and 50 pages that do not compress"
        )
        assert before - resident() == done["reclaimed"] == 32 * MIB
        program.say("hash")
        assert program.line() == content
        assert reclaim()["store"]["equal"] == 8192 - 50
        assert undo() == 32 * MIB
        program.say("hash")
        assert program.line() == content
