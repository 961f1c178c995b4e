"""Cost of a write trace (S2) for the workload, by granularity, and cost of a pause during the copy."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

from benchmarks.harness.bench import Setting
from benchmarks.migrate.ledger import Ledger
from pageferry._engine import SMALL_PAGE, BlockSender, Trace
from pageferry.memory.view import Memory
from pageferry.workloads.arena.control_socket.client import RemoteArena
from pageferry.workloads.open import open_workload

FULL, SMALL = 256 << 20, 64 << 20
ROUND = 0.15
"""Seconds between two collections, about the time that sending the arena takes."""
ROUNDS = 4

PATTERNS: dict[str, dict[str, Any]] = {
    "everything, as fast as it can": {},
    "one page in a hundred, all over": {"working_set": 0.01, "scatter": True},
    "the first tenth, half of the writes in a hundredth": {"working_set": 0.1, "skew": 3.0},
    "everything, 20 MiB/s": {"rate": 20 << 20},
}
RELEASES = {"no trace": None, "4K": 0, "2M": 1, "auto 64": 64, "auto 256": 256, "auto 448": 448}
"""`release_after` of the trace, by name of the granularity; None: no trace."""


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure each write pattern with each granularity, in turn."""
    runs = []
    for pattern, options in PATTERNS.items():
        with Ledger("stalls", SMALL if setting.quick else FULL, {"compressible": 0.0, **options}) as ledger:
            runs += asyncio.run(_pattern(ledger, pattern, setting.repetitions))
    return runs


async def _pattern(ledger: Ledger, pattern: str, repetitions: int) -> list[dict[str, Any]]:
    workload = await open_workload(ledger.name)
    assert isinstance(workload, RemoteArena)
    runs = []
    try:
        memory = Memory(workload)
        for _ in range(repetitions):
            for granularity, release in RELEASES.items():
                run = await traced(workload, memory, release)
                runs.append({"pattern": pattern, "granularity": granularity} | run)
            runs.append({"pattern": pattern, "granularity": "stopped"} | await stopped(workload, memory))
    finally:
        workload.close()
    return runs


async def traced(workload: RemoteArena, memory: Memory, release: int | None) -> dict[str, Any]:
    """Trace the workload for `ROUNDS` rounds, or only wait if `release` is None. Return the cost for the writer."""
    large = memory.collapsible(memory.large_units())
    before = await workload.report()
    began = time.perf_counter()
    trace = Trace(memory.segments, release, large) if release is not None else None
    sent = 0
    for _ in range(ROUNDS):
        await asyncio.sleep(ROUND)
        dirty = memory.page_sets()
        if trace is not None:
            trace.collect(dirty)
        sent += sum(map(len, dirty))
    after = await workload.report()
    seconds = time.perf_counter() - began
    result = {
        "writes-per-second": (int(str(after["writes"])) - int(str(before["writes"]))) / seconds,
        "longest-us": int(str(after["longest-stall-ns"])) / 1e3,
        "dirty-mib-per-round": sent * SMALL_PAGE / ROUNDS / 2**20,
    }
    if trace is not None:
        result |= {"install-ms": trace.install_seconds * 1e3, "released": trace.released_units}
        trace.remove()
        memory.restore_large_mappings(memory.large_units())
    return result


async def stopped(workload: RemoteArena, memory: Memory) -> dict[str, Any]:
    """Pause the writer while all memory is sent once. Return the cost for the writer."""
    near, far = _connection()
    sink = threading.Thread(target=_drain, args=(far,))
    sink.start()
    began = time.perf_counter()
    await workload.pause()
    try:
        sender = BlockSender([near.fileno()])
        sender.send(memory.mappings, memory.page_sets(full=True), 1)
    finally:
        await workload.resume()
    stall = time.perf_counter() - began
    sent = sender.progress.data
    del sender
    near.close()
    sink.join()
    return {"longest-us": stall * 1e6, "dirty-mib-per-round": sent * SMALL_PAGE / 2**20}


def _connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


def _drain(far: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    with far:
        while far.recv_into(buffer):
            pass
