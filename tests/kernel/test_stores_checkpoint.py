"""Checkpoints straight to a store: while the workload writes, from a store that is slow, gone or full, and killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

import pageferry
from pageferry import values
from pageferry.checkpoints import store_target
from pageferry.checkpoints.options import Options
from pageferry.checkpoints.target import target
from pageferry.cli.main import main
from pageferry.demo.ledger import LedgerOptions
from pageferry.errors import CheckpointError, ImageError, StoreError, UsageError
from pageferry.events import Event
from pageferry.stores import layout, spool, store
from pageferry.stores.events import StoreProgress
from pageferry.stores.push import BlockUpload
from pageferry.stores.streaming import StreamedPush
from tests.kernel.conftest import URL
from tests.kernel.programs import Program
from tests.saved import check_ledger, ledger
from tests.stores.fault_proxy import FaultProxy

T = TypeVar("T")

MIB = 1 << 20
SIZE = 24 * MIB
WRITER = LedgerOptions(threads=1, rate=32 * MIB, zero_fraction=0.2, compressible=0.4)
"""Options of a ledger that leaves processor time for the server."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of the cache and of spools. Packs have 2 MiB."""
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(layout, "PACK_LENGTH", 2 * MIB)
    return tmp_path / "cache"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return the URL of a store in a directory."""
    return f"file://{tmp_path}/store"


def filled(size: int = SIZE) -> pageferry.Arena:
    """Return an arena of random words."""
    arena = pageferry.Arena(size)
    words(arena)[:] = np.random.default_rng(1).integers(0, 1 << 63, size // 8, dtype="u8")
    return arena


def words(arena: Any) -> Any:
    return np.frombuffer(memoryview(arena), "u8")


def local(url: str, tmp_path: Path) -> Path:
    """Download an image, and return its path."""
    target = tmp_path / "downloads" / url.rpartition("/")[2]
    target.parent.mkdir(exist_ok=True)
    pageferry.pull_image(url, target)
    return target


def free_of_garbage(url: str) -> bool:
    """Return whether garbage collections free all space of a store in a directory without images."""
    for _ in range(2):
        make_old(url)
        pageferry.collect_garbage(url, grace="1h")
    return not [path for path in Path(url.removeprefix("file://")).rglob("*") if path.is_file()]


def make_old(url: str) -> None:
    """Set the modification times of all objects of a store in a directory to an earlier time."""
    then = time.time() - 7200
    for path in Path(url.removeprefix("file://")).rglob("*"):
        os.utime(path, (then, then))


def test_chain_of_a_writing_workload_is_saved_to_s3_and_exact(proxy: FaultProxy, tmp_path: Path) -> None:
    with ledger(8 * MIB, WRITER) as workload:
        first = pageferry.checkpoint(workload, f"{URL}/first", track=True)
        second = pageferry.checkpoint(workload, f"{URL}/second", parent=f"{URL}/first")
        third = pageferry.checkpoint(workload, f"{URL}/third", parent=f"{URL}/second", mode="stop")
    assert [one.image for one in (first, second, third)] == [f"{URL}/{name}" for name in ("first", "second", "third")]
    assert first.upload is not None
    assert first.upload.uploaded > 0.5 * first.bytes_written
    assert sum(first.phases.values()) == pytest.approx(first.total_time, rel=0.01)
    for name in ("first", "second", "third"):
        check_ledger(local(f"{URL}/{name}", tmp_path))
    listed = pageferry.list_images(URL).images
    assert [(one.name, one.parents, one.kind) for one in listed] == [
        ("first", 0, "arena"), ("second", 1, "arena"), ("third", 2, "arena"),
    ]  # fmt: skip


def test_dump_does_not_fill_the_disk_after_its_spool_was_full(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFERRY_SPOOL_SIZE", "4M")
    sizes: list[int] = []
    add = BlockUpload.add

    async def slow(self: BlockUpload, *arguments: Any) -> None:
        await asyncio.sleep(0.5)
        await add(self, *arguments)

    close = StreamedPush.close

    async def watched(self: StreamedPush) -> None:
        assert self.spool is not None
        sizes.append(os.fstat(self.spool.descriptor).st_blocks * 512)
        await close(self)

    monkeypatch.setattr(BlockUpload, "add", slow)
    monkeypatch.setattr(StreamedPush, "close", watched)
    with pytest.raises(CheckpointError, match="no image was written"):
        pageferry.dump(np.random.default_rng(1).random(256 * MIB // 8), f"{url}/array")
    (size,) = sizes
    assert size < 128 * MIB


def test_blocks_that_the_store_has_are_not_uploaded(url: str) -> None:
    arena = filled()
    first = pageferry.checkpoint(arena, f"{url}/one", mode="stop").upload
    words(arena)[0] += 1
    second = pageferry.checkpoint(arena, f"{url}/two", mode="stop").upload
    assert first is not None
    assert second is not None
    assert (first.blocks, second.blocks) == (SIZE // MIB, 1)
    restored = pageferry.restore(f"{url}/two")
    assert (words(restored) == words(arena)).all()


def test_file_is_the_parent_of_an_image_in_a_store(url: str, tmp_path: Path) -> None:
    arena = filled()
    pageferry.checkpoint(arena, tmp_path / "base", track=True)
    words(arena)[0] = 7
    result = pageferry.checkpoint(arena, f"{url}/child", parent=tmp_path / "base")
    assert (result.tracking, result.pages.data) == ("trace", 1)
    restored = pageferry.restore(f"{url}/child")
    assert (words(restored) == words(arena)).all()
    with pytest.raises(UsageError, match=r"its parent .* must be in the same directory"):
        pageferry.checkpoint(arena, tmp_path / "file", parent=f"{url}/child")


def test_parent_is_fetched_before_the_workload_is_touched(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = filled()
    pageferry.checkpoint(arena, f"{URL}/base")
    words(arena)[0] = 7
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "empty"))
    proxy.requests.clear()
    touched: list[int] = []

    def heard(_: Event) -> None:
        if not touched:
            touched.append(len(proxy.requests))
            proxy.inject("GET", "packs/", "corrupt", 1000)  # a block that is read now counts as different

    result = pageferry.checkpoint(arena, f"{URL}/child", parent=f"{URL}/base", listener=heard)
    assert (result.tracking, result.pages.data) == ("compare", 1)
    reads = [
        number for number, request in enumerate(proxy.requests) if request.startswith("GET") and "/packs/" in request
    ]
    assert reads
    assert max(reads) < touched[0]
    proxy.faults.clear()
    assert (words(pageferry.restore(f"{URL}/child")) == words(arena)).all()


def test_invalid_targets_are_refused_before_the_workload_is_touched(url: str, tmp_path: Path) -> None:
    arena = filled()
    pageferry.checkpoint(arena, f"{url}/a")
    heard: list[Event] = []
    with pytest.raises(ImageError, match="the store has an image of this name"):
        pageferry.checkpoint(arena, f"{url}/a", listener=heard.append)
    with pytest.raises(UsageError, match="https is read-only"):
        pageferry.checkpoint(arena, "https://host/store/a", listener=heard.append)
    with pytest.raises(UsageError, match="invalid image name"):
        pageferry.checkpoint(arena, f"{url}/", listener=heard.append)
    with pytest.raises(ImageError, match="no image of this name"):
        pageferry.checkpoint(arena, f"{url}/b", parent=f"{url}/none", listener=heard.append)
    assert heard == []


def test_disks_are_not_saved_to_a_store(url: str) -> None:
    with pytest.raises(UsageError, match="cannot use `disks` snapshot with file://"):
        target("path", f"{url}/a").check(values.options(Options, {"disks": "snapshot"}), None)


def test_store_without_rights_is_reported_before_the_workload_is_touched(proxy: FaultProxy, tmp_path: Path) -> None:
    heard: list[Event] = []
    with pytest.raises(StoreError, match="s3://none/fleet"):
        pageferry.checkpoint(filled(MIB), "s3://none/fleet/a", listener=heard.append)
    assert heard == []


def test_store_that_is_gone_for_seconds_delays_the_upload(proxy: FaultProxy, tmp_path: Path) -> None:
    def go(event: Event) -> None:
        if isinstance(event, pageferry.checkpoints.events.InstantEvent):
            proxy.gone = True
            threading.Timer(1.5, lambda: setattr(proxy, "gone", False)).start()

    with ledger(8 * MIB, WRITER) as workload:
        begin = time.monotonic()
        pageferry.checkpoint(workload, f"{URL}/a", listener=go)
        assert time.monotonic() - begin > 1.5
    check_ledger(local(f"{URL}/a", tmp_path))


@pytest.mark.parametrize("track", [pytest.param(False, marks=pytest.mark.only_full), True])
def test_store_that_is_gone_for_good_leaves_the_workload_unharmed(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: bool
) -> None:
    monkeypatch.setattr(store, "MAX_RETRIES", 3)

    def go(event: Event) -> None:
        proxy.gone = proxy.gone or type(event).__name__ == "InstantEvent"

    with ledger(8 * MIB, WRITER) as workload:
        with pytest.raises(StoreError, match=r"cannot write packs/.*no image was written, and a running workload"):
            pageferry.checkpoint(workload, f"{URL}/a", track=track, listener=go)
        proxy.gone = False
        assert pageferry.list_images(URL).images == []
        result = pageferry.checkpoint(workload, f"{URL}/b")
        assert result.tracking == "none"
    check_ledger(local(f"{URL}/b", tmp_path))


@pytest.mark.only_full
def test_spool_is_bounded_by_the_bandwidth_under_a_slow_store(proxy: FaultProxy) -> None:
    arena = filled(96 * MIB)
    proxy.pack_delay = 0.12  # at most 3 packs of 2 MiB in this time
    result = pageferry.checkpoint(arena, f"{URL}/a", bandwidth="24M")
    assert result.upload is not None
    assert result.upload.spool < 32 * MIB
    assert result.bytes_written > 96 * MIB


def test_spool_that_reaches_its_limit_ends_the_checkpoint(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFERRY_SPOOL_SIZE", "8M")
    proxy.pack_delay = 5.0
    arena = filled(48 * MIB)
    with pytest.raises(CheckpointError, match=r"the store is slower .* PAGEFERRY_SPOOL_SIZE"):
        pageferry.checkpoint(arena, f"{URL}/a")
    proxy.pack_delay = 0.0
    words(arena)[:] += 1
    monkeypatch.delenv("PAGEFERRY_SPOOL_SIZE")
    pageferry.checkpoint(arena, f"{URL}/a")
    assert (words(pageferry.restore(f"{URL}/a")) == words(arena)).all()


def test_spool_leaves_space_of_its_file_system(
    url: str, root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(small))
    monkeypatch.setattr(spool.Spool, "free", lambda *_: None)  # as if the store were slow
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M,mode=700", "tmpfs", small], check=True)
    try:
        arena = filled()
        with pytest.raises(CheckpointError, match=r"cannot write the spool .*free some space"):
            pageferry.checkpoint(arena, f"{url}/a", bandwidth="32M")
        assert pageferry.list_images(url).images == []
        assert os.statvfs(small).f_bfree > 15 * MIB // 4096
    finally:
        subprocess.run(["umount", small], check=True)
    assert free_of_garbage(url)


@pytest.mark.parametrize(
    "point", ["checkpoint.instant", pytest.param("checkpoint.saved", marks=pytest.mark.only_full), "store.uploaded"]
)
def test_killed_checkpoint_leaves_no_image_and_only_garbage(url: str, cache: Path, point: str) -> None:
    setup = '{"name": "victim", "size": 16777216, "options": {"threads": 1}, "exact": true}'
    with Program("-m", "pageferry.demo.process", setup) as program:
        program.json()
        done = subprocess.run(
            [sys.executable, "-m", "pageferry", "checkpoint", "victim", f"{url}/a"],
            env=os.environ | {"PAGEFERRY_FAULT": f"{point}=kill"},
            timeout=60,
            stderr=subprocess.PIPE,
        )
        assert done.returncode == -9, done.stderr
        assert pageferry.list_images(url).images == []
        assert [path for path in cache.rglob("*") if path.is_file() and path.parent.parent.name != "uploads"] == []
        assert main(["checkpoint", "victim", f"{url}/a", "--output", "json"]) == 0
    assert [image.name for image in pageferry.list_images(url).images] == ["a"]
    pageferry.delete_image(f"{url}/a")
    assert free_of_garbage(url)


def test_cancelled_checkpoint_publishes_nothing(url: str) -> None:
    arena = filled(64 * MIB)

    async def run() -> None:
        begun = asyncio.Event()
        task = asyncio.ensure_future(
            pageferry.checkpoint_async(
                arena,
                f"{url}/a",
                bandwidth="16M",
                listener=lambda event: begun.set() if isinstance(event, StoreProgress) else None,
            )
        )
        await asyncio.wait_for(begun.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    words(arena)[:] += 1  # no write waits
    assert pageferry.list_images(url).images == []
    assert free_of_garbage(url)


class _Collecting(StreamedPush):
    """Upload during which the image whose blocks it reuses is deleted, and a collection marks them."""

    async def _complete(self, *arguments: Any) -> Any:
        manifest = await super()._complete(*arguments)
        store = str(self._url.store)
        await pageferry.delete_image_async(f"{store}/old")
        make_old(store)
        await pageferry.collect_garbage_async(store, grace="1h")
        return manifest


def test_collection_during_a_checkpoint_loses_no_blocks(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_target, "StreamedPush", _Collecting)
    arena = filled()
    pageferry.push_image(pageferry.checkpoint(arena, tmp_path / "old").image, f"{url}/")
    words(arena)[:MIB] += 1
    pageferry.checkpoint(arena, f"{url}/new")
    for _ in range(2):
        make_old(url)
        pageferry.collect_garbage(url, grace="1h")
    assert (words(pageferry.restore(f"{url}/new")) == words(arena)).all()


def test_second_attempt_follows_the_spool_from_its_beginning(url: str) -> None:
    """The trace cannot be used, because the pause discards memory. The second attempt compares with the parent."""
    discards: list[bool] = []

    def pause() -> None:
        if discards:
            hole = ("--punch-hole", "--offset", "0", "--length", "4096", "-n")
            subprocess.run(["fallocate", *hole, f"/proc/{os.getpid()}/fd/{arena.descriptor}"], check=True)

    arena = pageferry.Arena(SIZE, on_pause=pause)
    words(arena)[:] = np.random.default_rng(1).integers(0, 1 << 63, SIZE // 8, dtype="u8")
    pageferry.checkpoint(arena, f"{url}/one", track=True)
    words(arena)[: 4 * MIB // 8] += 1
    discards.append(True)
    saving = pageferry.checkpoint_async(arena, f"{url}/two", parent=f"{url}/one")
    result = asyncio.run(_within(60, saving))
    assert result.tracking == "compare"
    restored = pageferry.restore(f"{url}/two")
    assert (words(restored) == words(arena)).all()
    assert words(restored)[0] == 0


async def _within(seconds: float, saving: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wait_for(saving, seconds)


def test_command_reports_the_upload(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        time.sleep(0.5)
        assert main(["checkpoint", f"pid:{sleeper.pid}", f"{url}/heap", "--regions", "heap"]) == 0
    finally:
        sleeper.kill()
        sleeper.wait()
    out = capsys.readouterr().out
    assert f"in {url}/heap" in out
    assert "spool of up to" in out
    assert pageferry.image_info(f"{url}/heap").kind == "process"
