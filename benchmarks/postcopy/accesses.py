"""Latency of accesses to missing pages: without other transfers, and while all other pages are pushed.

The benchmark runs both sides of a post-copy migration without the migration itself: a process whose pages are all
missing, its pager, and the page server of the source, with TCP connections over loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.bench import Setting
from pageferry._engine import (
    SMALL_PAGE,
    MappedSegment,
    Mapping,
    Pager,
    PageServer,
    PageSet,
    PeerSource,
    Placer,
    Space,
    TargetRegion,
)
from pageferry.migration import preallocate
from pageferry.workloads.arena.arena import memory_file

FULL, SMALL = 512 << 20, 32 << 20
ACCESSES = 2000
"""Number of pages that are read, in random order. During the push, only accesses to missing pages are counted."""
WAITED = 5000
"""Minimum latency of an access to a missing page, nanoseconds. If an access is faster, its page was present."""
METHODS: dict[str, int | None] = {"idle": None, "pushed at 1 Gbit/s": 125_000_000, "pushed without limit": 0}
"""Push bandwidth in bytes per second, 0 for unlimited; None: no push, only requested pages are sent."""


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure all methods in turn."""
    length = SMALL if setting.quick else FULL
    runs = []
    for number in range(setting.repetitions):
        for method, bandwidth in METHODS.items():
            times = _waits(length, bandwidth, random.Random(number))
            runs.append({"method": method, "accesses": len(times)} | _percentiles(times))
    return runs


def _waits(length: int, bandwidth: int | None, choice: random.Random) -> list[int]:
    """Return the latency of each access that waited, nanoseconds."""
    pages = length // SMALL_PAGE
    wanted = choice.sample(range(pages), min(ACCESSES, pages // 16))
    with _file(length) as there, _file(length) as here, _toucher(here, length) as (process, address), _links() as links:
        _fill(there, length)
        missing = PageSet(pages)
        missing.insert(0, pages)
        source, ours = Mapping(there, length), Mapping(here, length)
        large = source.large_units()
        # The destination of a migration preallocates memory before the source pauses.
        asyncio.run(preallocate.allocate(Placer([TargetRegion(ours, SMALL_PAGE, large)], []), [large]))
        server = PageServer([source], [missing], links[0][0], links[0][1:], bandwidth=bandwidth or 0)
        server.start()
        userfault = Space(process.pid).missing_faults(discards=True).descriptor
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, userfault)
            flags = os.memfd_create("flags", os.MFD_CLOEXEC)
            stack.callback(os.close, flags)
            os.ftruncate(flags, Pager.flags_length(pages))
            Pager.set_flags(flags, [missing])
            pager = Pager(
                PeerSource(links[1][0], links[1][1:]),
                [TargetRegion(ours, SMALL_PAGE, large)],
                [MappedSegment(Space(process.pid), address, length)],
                {process.pid: userfault},
                flags,
                begin="kept",
            )
            pushing = threading.Thread(target=server.push)
            if bandwidth is not None:
                pushing.start()
            times = _touch(process, wanted)
            if bandwidth is None:
                pushing.start()
            pushing.join()
            if not pager.wait(60):
                raise RuntimeError(f"cannot fetch all pages from {source} within 60 s")
            del pager, server
    return [time for time in times if time >= WAITED]


def _touch(process: subprocess.Popen[bytes], pages: list[int]) -> list[int]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(pages).encode() + b"\n")
    process.stdin.flush()
    times: list[int] = json.loads(process.stdout.readline())
    return times


@contextlib.contextmanager
def _file(length: int) -> Iterator[int]:
    """Yield the descriptor of a memory file on huge pages."""
    descriptor, _ = memory_file(length)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fill(descriptor: int, length: int) -> None:
    """Fill a file with incompressible contents without zero pages."""
    piece = os.urandom(1 << 20)
    for at in range(0, length, len(piece)):
        os.pwrite(descriptor, piece, at)


@contextlib.contextmanager
def _toucher(descriptor: int, length: int) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    words = [sys.executable, "-m", "benchmarks.postcopy.toucher", str(descriptor), str(length)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, pass_fds=[descriptor], cwd=machine.ROOT) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@contextlib.contextmanager
def _links() -> Iterator[tuple[list[int], list[int]]]:
    """Yield the descriptors of both ends of two connections, one for requests and one for the push."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ours = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(2)]
        theirs = [stack.enter_context(listener.accept()[0]) for _ in range(2)]
        yield [each.fileno() for each in theirs], [each.fileno() for each in ours]


def _percentiles(times: list[int]) -> dict[str, float]:
    ordered = sorted(times) or [0]
    parts = {"p50-us": 0.5, "p90-us": 0.9, "p99-us": 0.99, "longest-us": 1.0}
    return {name: ordered[min(int(len(ordered) * part), len(ordered) - 1)] / 1e3 for name, part in parts.items()}
