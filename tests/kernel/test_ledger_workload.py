"""Built-in workload: the ledger process, its child processes, and a destination that receives the ledger."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from pageferry import _engine
from pageferry.demo.ledger import LedgerOptions, LedgerState, LedgerWorkload
from pageferry.errors import UsageError, WorkloadDied, WorkloadError
from pageferry.host.registry import ArenaEntry, Registry
from pageferry.workloads.arena.arena import Arena, memory_file
from pageferry.workloads.arena.control_socket.client import RemoteArena
from pageferry.workloads.lifecycle import Status
from pageferry.workloads.protocols import Migratable
from tests.kernel.programs import Program, wait_until

MIB = 1 << 20
OPTIONS = LedgerOptions(threads=3, zero_fraction=0.2, rate=64 * MIB)


@contextmanager
def ledger_process(name: str, **setup: Any) -> Iterator[Program]:
    setup = {"name": name, "size": 16 * MIB, "options": {"threads": 3, "zero_fraction": 0.2}} | setup
    with Program("-m", "pageferry.demo.process", json.dumps(setup)) as program:
        assert program.json() == {"type": "ready", "name": name, "pid": program.process.pid}
        yield program


@asynccontextmanager
async def controlled(name: str) -> AsyncIterator[RemoteArena]:
    entry = Registry().lookup(name)
    assert isinstance(entry, ArenaEntry)
    arena = await RemoteArena.connect(entry.control_socket)
    try:
        yield arena
    finally:
        arena.close()


def received(source: RemoteArena, processes: int = 1, **options: Any) -> LedgerWorkload:
    """Return a destination in its state after the last round: a paused arena with a copy of the source's memory."""
    (region,) = source.regions
    file, _ = memory_file(region.length)
    try:
        arena = Arena.from_file(file, region.length)
    finally:
        os.close(file)
    workload = LedgerWorkload(arena, processes=processes, **options)
    copy(region.fd, arena.fileno(), region.length)
    return workload


def copy(source: int, destination: int, length: int) -> None:
    memoryview(_engine.Mapping(destination, length))[:] = memoryview(_engine.Mapping(source, length))


def test_ledger_in_this_process_is_a_workload() -> None:
    workload = LedgerWorkload.create(8 * MIB, OPTIONS, name="inside")
    assert isinstance(workload, Migratable)
    assert isinstance(Registry().lookup("inside"), ArenaEntry)
    assert workload.identity.name == workload.name == "inside"
    before = workload.writes()
    wait_until(lambda: workload.writes() > before + 100, "writes")
    assert workload.faults().major == 0
    asyncio.run(workload.pause())
    assert workload.verify().intact
    writes = workload.writes()
    state = json.loads(asyncio.run(workload.save_state()))
    assert (sum(state["writes"]), state["options"]["threads"], state["digest"]) == (writes, 3, None)
    asyncio.run(workload.resume())
    wait_until(lambda: workload.writes() > writes, "writes after the pause")
    workload.stop()
    assert workload.verify().intact
    assert "inside" not in Registry().entries()


def test_invalid_setups_are_refused() -> None:
    with pytest.raises(UsageError, match="working_set"):
        LedgerWorkload.create(8 * MIB, LedgerOptions(working_set=-1))
    with pytest.raises(UsageError, match="cannot divide 2 threads among 3"):
        LedgerWorkload.create(8 * MIB, LedgerOptions(threads=2), processes=3)
    with Program("-m", "pageferry.demo.process", '{"name": "x", "size": 4096, "extra": 1}') as program:
        assert program.wait() == UsageError.exit_code


@pytest.mark.parametrize(("here", "there"), [(1, 1), (3, 2)])
def test_ledger_moves_between_processes(here: int, there: int) -> None:
    async def move(program: Program) -> None:
        async with controlled("moving") as source:
            assert len(source.regions[0].segments) == here
            await asyncio.sleep(0.1)
            await source.pause()
            state = await source.save_state()
            destination = received(source, there)
            assert len(destination.regions[0].segments) == there
            await destination.load_state(state)
            await source.commit()
            await destination.resume()
            await source.discard()
        end = program.json()
        assert (end["reason"], end["intact"], program.wait()) == ("moved", True, 0)
        assert destination.arena.status is Status.RUNNING
        wait_until(lambda: destination.writes() > end["writes"] + 1000, "writes at the destination")
        await destination.pause()
        assert destination.verify().intact
        destination.stop()

    with ledger_process("moving", processes=here, exact=True) as program:
        asyncio.run(move(program))


def test_signals_stop_the_ledger() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with ledger_process("ending", processes=2) as program:
            program.process.send_signal(number)
            end = program.json()
            assert (end["type"], end["reason"], end["intact"]) == ("ledger", "stopped", True)
            assert program.wait() == 0


def test_damage_by_another_process_is_reported_at_the_end() -> None:
    async def damage() -> None:
        async with controlled("damaged") as arena:
            await arena.pause()
            (region,) = arena.regions
            mapping = _engine.Mapping(region.fd, region.length)
            at = _engine.Ledger.attach(mapping, threads=0).page_offset(5)
            memoryview(mapping)[at : at + 4096] = b"\xaa" * 4096
            await arena.resume()

    with ledger_process("damaged") as program:
        asyncio.run(damage())
        program.process.send_signal(signal.SIGTERM)
        end = program.json()
        assert (end["intact"], end["torn"] + end["overwritten"]) == (False, 1)
        assert program.wait() == 1


def test_state_of_another_snapshot_point_is_refused() -> None:
    async def refuse() -> None:
        async with controlled("instants") as source:
            await source.pause()
            early = await source.save_state()
            destination = received(source)
            await source.resume()
            await asyncio.sleep(0.05)
            await source.pause()
            late = await source.save_state()
            assert early != late
            with pytest.raises(WorkloadError, match="differs from the state at the pause"):
                await destination.load_state(late)
            await destination.load_state(early)
            destination.stop()

    with ledger_process("instants"):
        asyncio.run(refuse())


def test_discarded_destination_leaves_no_process_or_name() -> None:
    async def give_up() -> None:
        async with controlled("staying") as source:
            destination = received(source, 2, on_moved=lambda: pytest.fail("the arena never ran at the destination"))
            destination.arena.register("never-ran")
            child = destination.regions[0].segments[1].pid
            await destination.discard()
            assert not _lives(child)
            assert "never-ran" not in Registry().entries()
            assert await source.running()

    with ledger_process("staying"):
        asyncio.run(give_up())


def test_digest_detects_one_wrong_byte() -> None:
    async def refuse() -> None:
        async with controlled("digested") as source:
            await source.pause()
            destination = received(source)
            at = _engine.Ledger.attach(destination.arena, threads=0).page_offset(9)
            memoryview(destination.arena)[at + 4000] ^= 1
            with pytest.raises(WorkloadError, match="pages differ"):
                await destination.load_state(await source.save_state())
            destination.stop()

    with ledger_process("digested", exact=True):
        asyncio.run(refuse())


@pytest.mark.parametrize("state", [b"", b"{}", b"not json", bytes(100)])
def test_malformed_states_are_refused(state: bytes) -> None:
    file, _ = memory_file(4 * MIB)
    workload = LedgerWorkload(Arena.from_file(file, 4 * MIB))
    os.close(file)
    with pytest.raises(WorkloadError):
        asyncio.run(workload.load_state(state))


def test_state_without_its_memory_is_refused() -> None:
    file, _ = memory_file(4 * MIB)
    workload = LedgerWorkload(Arena.from_file(file, 4 * MIB))
    os.close(file)
    state = json.dumps({"options": {}, "writes": [1], "fingerprint": 1, "digest": None}).encode()
    assert json.loads(state).keys() == set(LedgerState.__struct_fields__)
    with pytest.raises(WorkloadError, match="not a ledger"):
        asyncio.run(workload.load_state(state))


def test_killed_child_is_reported_and_others_continue() -> None:
    async def fail() -> None:
        async with controlled("bereaved") as arena:
            with pytest.raises(WorkloadDied, match="has exited"):
                await arena.pause()
            assert await arena.running()
            (region,) = arena.regions
            ledger = _engine.Ledger.attach(_engine.Mapping(region.fd, region.length), threads=0)
            before = ledger.writes()
            wait_until(
                lambda: sum(w > b for w, b in zip(ledger.writes(), before, strict=True)) == 2,
                "writes of the other children",
            )

    with ledger_process("bereaved", processes=3) as program:
        child = next(pid for pid in asyncio.run(_pids("bereaved")) if pid != program.process.pid)
        os.kill(child, signal.SIGKILL)
        asyncio.run(fail())


def test_children_exit_with_their_parent() -> None:
    with ledger_process("orphans", processes=3) as program:
        pids = asyncio.run(_pids("orphans"))
        assert len(pids) == 3
        program.kill()
        wait_until(lambda: not any(_lives(pid) for pid in pids), "the exit of the children")


async def _pids(name: str) -> list[int]:
    async with controlled(name) as arena:
        return [segment.pid for segment in arena.regions[0].segments]


def _lives(pid: int) -> bool:
    """Return whether a process exists and is not a zombie. The reaper of orphans may be slow to collect zombies."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_report_counts_since_the_last_report() -> None:
    async def ask() -> None:
        async with controlled("reporting") as arena:
            first = await arena.report()
            await asyncio.sleep(0.05)
            second = await arena.report()
            assert isinstance(first["writes"], int)
            assert isinstance(second["writes"], int)
            stalls = second["stalls"]
            assert isinstance(stalls, list)
            assert 0 < sum(stalls) <= second["writes"]
            assert second["writes"] > first["writes"]
            assert isinstance(second["longest-stall-ns"], int)

    with ledger_process("reporting", processes=2):
        asyncio.run(ask())
