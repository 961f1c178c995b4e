"""Arenas whose memory is fetched from an S3 store on demand, through a proxy that injects faults.

Programs in other processes access the memory: a thread that waits for a page holds the GIL, and the proxy needs it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.images.image import ImageFile
from tests.kernel.programs import Program, wait_until
from tests.stores.fault_proxy import FaultProxy
from tests.stores.fixtures import URL, proxy, server  # noqa: F401

READER = str(Path(__file__).with_name("lazy_reader.py"))
SIZE = 16 << 20
MIB = 1 << 17
"""Number of words in a MiB."""

Words = np.ndarray[Any, Any]


@pytest.fixture
def words(proxy: FaultProxy, tmp_path: Path) -> Words:  # noqa: F811
    """Return the words of an arena whose image `image` is in the store, as a child of `base`, with half of the pages
    in each."""
    arena = pageferry.Arena(SIZE)
    memory = np.frombuffer(memoryview(arena), "u8")
    memory[:] = np.random.default_rng(3).integers(0, 1 << 63, SIZE // 8, dtype="u8")
    pageferry.checkpoint(arena, tmp_path / "base", track=True)
    memory[: len(memory) // 2] = np.random.default_rng(4).integers(0, 1 << 63, SIZE // 16, dtype="u8")
    pageferry.checkpoint(arena, tmp_path / "image", parent=tmp_path / "base")
    pageferry.push_image(tmp_path / "image", f"{URL}/{tmp_path.name}")
    proxy.requests.clear()
    proxy.sent.clear()
    return memory.copy()


def reader(tmp_path: Path, **options: Any) -> Program:
    """Restore the arena in another process."""
    return Program(READER, f"{URL}/{tmp_path.name}", json.dumps(options))


def reader_of(image: str) -> Program:
    """Restore the arena from a file, in another process."""
    return Program(READER, image)


def pack_requests(proxy: FaultProxy) -> int:  # noqa: F811
    return sum("packs/" in request for request in proxy.requests)


def pack_bytes(proxy: FaultProxy) -> int:  # noqa: F811
    return sum(count for path, count in proxy.sent.items() if "packs/" in path)


def checksum(words: Words) -> int:
    return sum(int(word) for word in words[::512])


def test_restore_takes_three_requests_and_an_access_one(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    with reader(tmp_path, prefetch=False) as program:
        assert int(program.line()) == SIZE
        assert [request.split("/")[3] for request in proxy.requests] == ["images", "manifests", "manifests"]
        for at in (5, len(words) - 5):  # in the image, and in its parent
            program.say(str(at))
            assert int(program.line()) == words[at]
        assert pack_requests(proxy) == 2
        (image,) = pageferry.list_cache().images
        assert not image.complete
        assert image.length < image.contents


def test_all_memory_is_fetched_in_the_background(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    proxy.delay = 0.02
    with reader(tmp_path) as program:
        program.line()
        program.say("load")
        assert program.line() == "loaded"
        program.say("sum")
        assert int(program.line()) == checksum(words)
        wait_until(lambda: pageferry.list_cache().images[0].complete, "the image in the cache")
    assert pack_bytes(proxy) < 1.2 * SIZE  # without the pages of the parent that the image replaces
    proxy.gone = True
    with reader_of(pageferry.list_cache().images[0].path) as program:  # needs no store
        program.line()
        program.say("sum")
        assert int(program.line()) == checksum(words)
    proxy.gone = False
    (image,) = pageferry.list_cache().images
    assert pageferry.verify_image(image.path).findings == []  # reads the other blocks too


@pytest.mark.parametrize("action", ["busy", "reset", "cut", "short", "corrupt"])
def test_faults_of_requests_are_repaired(
    proxy: FaultProxy,  # noqa: F811
    words: Words,
    tmp_path: Path,
    action: Any,
) -> None:
    proxy.inject("GET", "packs/", action, 1 if action in ("short", "corrupt") else 8)
    with reader(tmp_path) as program:
        program.line()
        program.say("sum")
        assert int(program.line()) == checksum(words)


def test_access_waits_while_the_store_is_gone(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    with reader(tmp_path, prefetch=False) as program:
        program.line()
        program.say("1")
        assert int(program.line()) == words[1]
        proxy.gone = True
        program.say(str(len(words) - 1))
        time.sleep(3)
        assert program.process.poll() is None
        proxy.gone = False
        assert int(program.line()) == words[-1]


def test_waiting_accesses_do_not_delay_others(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    with reader(tmp_path, prefetch=False) as program:
        program.line()
        program.say("0")
        program.line()
    with reader(tmp_path, prefetch=False) as program:
        program.line()
        proxy.gone = True
        for at in range(2, 14, 2):
            program.say(f"block {at * MIB}")
        time.sleep(1)
        program.say("0")
        assert int(program.line()) == words[0]
        proxy.gone = False
        program.say(str(13 * MIB))
        assert int(program.line()) == words[13 * MIB]


def test_slow_request_is_sent_again(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    with reader(tmp_path, prefetch=False) as program:
        program.line()
        for at in range(4):
            program.say(str(at * MIB))
            assert int(program.line()) == words[at * MIB]
        proxy.inject("GET", "packs/", "stall")
        begin = time.monotonic()
        program.say(str(5 * MIB))
        assert int(program.line()) == words[5 * MIB]
        assert time.monotonic() - begin < proxy.stall / 2
        assert pack_requests(proxy) == 6


@pytest.mark.parametrize("prefetch", [False, True])
def test_access_waits_while_the_store_is_silent(
    proxy: FaultProxy,  # noqa: F811
    words: Words,
    tmp_path: Path,
    prefetch: bool,
) -> None:
    proxy.stall = 600
    proxy.inject("GET", "packs/", "stall", 10000)
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        options = json.dumps({"prefetch": prefetch})
        with Program(READER, f"{URL}/{tmp_path.name}", options, stderr=stderr) as program:
            program.line()
            program.say(str(5 * MIB))
            wait_until(lambda: "the workload waits for blocks" in log.read_text(), "the warning")
            proxy.faults.clear()
            assert int(program.line()) == words[5 * MIB]
            wait_until(lambda: "blocks can be fetched again" in log.read_text(), "the end of the wait")


def test_access_that_waits_is_reported_while_others_succeed(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        options = json.dumps({"prefetch": False})
        with Program(READER, f"{URL}/{tmp_path.name}", options, stderr=stderr) as program:
            program.line()
            program.say("0")
            program.line()
            pack = next(request for request in proxy.requests if "packs/" in request).rsplit("/", 1)[1]
            proxy.inject("GET", f"packs/(?!{pack})", "busy", 10000)
            program.say(f"block {12 * MIB}")  # in the parent, which is in another pack
            for at in range(1, 7):
                time.sleep(1)
                program.say(str(at * MIB))
                assert int(program.line()) == words[at * MIB]
            assert "the workload waits for blocks" in log.read_text()


def test_cancelled_fetch_leaves_no_blocked_reads(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    with reader(tmp_path, prefetch=False) as program:
        program.line()
    (image,) = pageferry.list_cache().images
    proxy.gone = True
    with Program(str(Path(__file__).with_name("lazy_fetch.py")), image.path) as program:
        assert "the process that reads the store has ended" in program.line()
        assert program.wait() == 0


@pytest.mark.parametrize("action", ["short", "corrupt"])
def test_wrong_contents_are_reported(
    proxy: FaultProxy,  # noqa: F811
    words: Words,
    tmp_path: Path,
    action: Any,
) -> None:
    proxy.inject("GET", "packs/", action, 10000)
    with reader(tmp_path, prefetch=False) as program:
        program.line()
        program.say("load")
        assert "was damaged, truncated or replaced" in program.line()
        program.say("1")
        assert program.wait() == -signal.SIGBUS


def test_killed_restore_leaves_blocks_for_the_next(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    with reader(tmp_path, prefetch=False) as program:
        program.line()
        for at in range(8):
            program.say(str(at * MIB))
            program.line()
        program.kill()
    before = pack_bytes(proxy)
    assert before > 4 << 20
    proxy.sent.clear()
    with reader(tmp_path) as program:
        program.line()
        program.say("load")
        program.line()
        program.say("sum")
        assert int(program.line()) == checksum(words)
    (image,) = pageferry.list_cache().images
    assert before + pack_bytes(proxy) < image.contents * 1.1


def test_damaged_block_in_the_cache_is_fetched_again(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    with reader(tmp_path, prefetch=False) as program:
        program.line()
        program.say("0")
        program.line()
    (image,) = pageferry.list_cache().images
    offset, length = ImageFile(image.path).image.blocks[0]
    with open(image.path, "r+b") as file:
        file.seek(offset + length // 2)
        file.write(os.urandom(4096))
    with reader(tmp_path, prefetch=False) as program:
        program.line()
        for at in range(0, MIB, 512):
            program.say(str(at))
            assert int(program.line()) == words[at]
    assert pack_requests(proxy) == 2


def test_two_restores_at_the_same_time_read_the_same(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    with reader(tmp_path) as first, reader(tmp_path, memory="shared") as second:
        for program in (first, second):
            program.line()
            program.say("sum")
        for program in (first, second):
            assert int(program.line()) == checksum(words)


def test_entry_is_removed_while_it_is_read(proxy: FaultProxy, words: Words, tmp_path: Path) -> None:  # noqa: F811
    with reader(tmp_path, prefetch=False) as program:
        program.line()
        assert len(pageferry.clear_cache().removed) == 1
        program.say("sum")
        assert int(program.line()) == checksum(words)


def test_programs_that_use_a_store_exit_without_an_abort(proxy: FaultProxy) -> None:  # noqa: F811
    """Threads of the client that take the GIL while the interpreter is finalised would abort about half of them."""
    program = f"import pageferry; pageferry.list_images({URL!r})"
    programs = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(6)]
    assert [one.wait(60) for one in programs] == [0] * 6
