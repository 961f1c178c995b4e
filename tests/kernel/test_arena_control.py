"""Named arenas controlled by other processes. However a client exits, the arena has exactly one owner."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry import _engine
from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.registry import ArenaEntry, Registry
from pageferry.workloads.arena.control_socket.client import RemoteArena
from pageferry.workloads.lifecycle import Status
from pageferry.workloads.protocols import Migratable
from tests.kernel.programs import Program, wait_until

HERE = Path(__file__).parent


@pytest.fixture
def owner() -> Iterator[Program]:
    with Program(str(HERE / "arena_owner.py"), "owned") as program:
        assert program.line() == "ready"
        yield program


def control_socket() -> str:
    entry = Registry().lookup("owned")
    assert isinstance(entry, ArenaEntry)
    return entry.control_socket


def client(*calls: str) -> Program:
    return Program(str(HERE / "arena_client.py"), control_socket(), *calls)


def counter(owner: Program) -> int:
    owner.say("read")
    return int(owner.line())


def counts(owner: Program) -> bool:
    """Return whether the counter of the program increases by more than 10 before a timeout."""
    before = counter(owner)
    try:
        wait_until(lambda: counter(owner) > before + 10, "the counter to increase")
    except AssertionError:
        return False
    return True


def stands_still(owner: Program) -> bool:
    before = counter(owner)
    return all(counter(owner) == before for _ in range(100))


def test_controlled_arena_moves(owner: Program) -> None:
    async def move() -> None:
        arena = await RemoteArena.connect(control_socket())
        assert isinstance(arena, Migratable)
        assert (arena.name, arena.pid, await arena.running()) == ("owned", owner.process.pid, True)
        (region,) = arena.regions
        assert {segment.pid for segment in region.segments} == {owner.process.pid}
        words = memoryview(_engine.Mapping(region.fd, region.length)).cast("Q")
        await arena.pause()
        assert owner.line() == "paused"
        before = words[0]
        assert before > 0
        assert stands_still(owner)
        assert counter(owner) == before == words[0]
        assert await arena.save_state() == b"original"
        large = bytes(range(256)) * (3 << 12)
        await arena.load_state(large)
        assert await arena.save_state() == large
        assert arena.faults().minor > 0
        await arena.commit()
        await arena.discard()
        assert owner.line() == "moved"
        assert await arena.status() is Status.MOVED
        arena.close()

    asyncio.run(move())
    assert Registry().entries() == {}
    assert stands_still(owner)


def test_client_killed_while_paused_resumes_arena(owner: Program) -> None:
    with client("pause") as killed:
        assert killed.line() == "done"
        assert owner.line() == "paused"
        killed.kill()
        assert owner.line() == "resumed"
    assert counts(owner)


def test_client_that_closes_while_paused_resumes_arena(owner: Program) -> None:
    async def close() -> None:
        arena = await RemoteArena.connect(control_socket())
        await arena.pause()
        arena.close()

    asyncio.run(close())
    assert (owner.line(), owner.line()) == ("paused", "resumed")
    assert counts(owner)


def test_client_killed_after_commit_leaves_arena_paused(owner: Program) -> None:
    with client("pause", "commit") as killed:
        assert killed.line() == "done"
        assert owner.line() == "paused"
        killed.kill()

    async def recover() -> None:
        arena = await RemoteArena.connect(control_socket())
        assert await arena.status() is Status.COMMITTED
        assert stands_still(owner)
        with pytest.raises(WorkloadError, match="cannot be paused"):
            await arena.pause()
        await arena.resume()
        assert await arena.running()
        arena.close()

    asyncio.run(recover())
    assert owner.line() == "resumed"
    assert counts(owner)


def test_paused_arena_refuses_other_clients(owner: Program) -> None:
    async def interfere() -> None:
        first, second = [await RemoteArena.connect(control_socket()) for _ in range(2)]
        await first.pause()
        for call in (second.pause, second.resume, second.save_state, second.commit, second.discard):
            with pytest.raises(WorkloadError, match="another"):
                await call()
        second.close()
        assert await first.status() is Status.PAUSED
        await first.resume()
        first.close()

    asyncio.run(interfere())
    assert (owner.line(), owner.line()) == ("paused", "resumed")


def test_failing_callback_is_reported_to_client(owner: Program) -> None:
    owner.say("fail")
    assert owner.line() == "failing"

    async def fail() -> None:
        arena = await RemoteArena.connect(control_socket())
        with pytest.raises(WorkloadError, match="RuntimeError: will not"):
            await arena.pause()
        assert await arena.running()
        arena.close()

    asyncio.run(fail())
    assert owner.line() == "resumed"
    assert counts(owner)


def test_killed_program_is_reported_as_died(owner: Program) -> None:
    async def die() -> None:
        arena = await RemoteArena.connect(control_socket())
        await arena.pause()
        owner.kill()
        with pytest.raises(WorkloadDied):
            await arena.save_state()
        with pytest.raises(WorkloadDied):
            await arena.running()
        arena.close()

    asyncio.run(die())


def test_connecting_to_missing_socket_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkloadDied):
        asyncio.run(RemoteArena.connect(str(tmp_path / "none")))


def test_forked_children_are_in_regions(owner: Program) -> None:
    owner.say("fork")
    child = int(owner.line())

    async def look() -> None:
        arena = await RemoteArena.connect(control_socket())
        own, inherited = sorted(arena.regions[0].segments, key=lambda segment: segment.pid != owner.process.pid)
        assert (inherited.pid, inherited.address, inherited.length) == (child, own.address, own.length)
        arena.close()

    asyncio.run(look())


@pytest.mark.usefixtures("owner", "root")
def test_other_users_are_refused() -> None:
    path = Path(control_socket())
    script = f"""
import os, socket
os.setgid(65534)
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
try:
    connection.connect({str(path)!r})
    print(connection.recv(1))
except (PermissionError, ConnectionResetError) as error:
    print(type(error).__name__)
"""
    opened = [path, *path.parents]
    modes = {folder: folder.stat().st_mode for folder in opened}
    with Program("-c", script) as stranger:
        assert stranger.line() == "PermissionError"
    try:
        for folder in opened:
            folder.chmod(0o777)
        with Program("-c", script) as stranger:
            assert stranger.line() == "b''"
    finally:
        for folder, mode in modes.items():
            os.chmod(folder, mode)
