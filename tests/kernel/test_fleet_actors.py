"""Tests of movable actors whose move has an unknown outcome. The migration is a real one; the successor is not an actor
of Ray, but a process that is killed when it becomes the owner."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import pageferry
from pageferry.errors import CallTimeout, FleetError, MigrationError, OutcomeUnknown
from pageferry.fleet import Movable, MovableHandle, actors, cluster
from pageferry.fleet.actors import ARRIVED, FAILED, REDIRECTED, SERVED, WAITING, Server
from pageferry.fleet.cluster import ActorExited
from tests.kernel.programs import wait_until
from tests.kernel.test_moved import receiver

pytestmark = pytest.mark.usefixtures("root")


class Counter(Movable):
    """Actor that counts its calls."""

    def open(self, arrays: pageferry.Arrays) -> None:
        self.count = arrays["count"] if "count" in arrays else arrays.zeros("count", 1, "i8")

    def add(self) -> int:
        """Count a call, and return the number of calls."""
        self.count[0] += 1
        return int(self.count[0])


class Successor:
    """Successor that does not exist in Ray: `receive` returns `address`, and `arrival` the values of `replies`."""

    def __init__(self, address: str, *replies: str | Exception) -> None:
        self.address = address
        self.replies = list(replies)
        self.killed = False

    def receive(self) -> str:
        """Return the address of the receiver."""
        return self.address

    def arrival(self) -> str:
        """Return the next reply; the last one is repeated."""
        found = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(found, Exception):
            raise found
        return found

    def kill(self) -> None:
        """End the process."""
        self.killed = True


class World:
    """Parts of Ray that a `Server` uses."""

    def __init__(self) -> None:
        self.successors: list[Successor] = []
        self.generations = [0]
        self.ended = threading.Event()

    def start(self, *_: Any) -> Successor:
        """Start the next successor."""
        return self.successors.pop(0)

    def exists(self, after: int = -1, before: int = 1000) -> bool:
        """Return whether a generation exists."""
        return any(after < one < before for one in self.generations)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    found = World()
    monkeypatch.setattr(actors, "MovableActors", lambda _: found)
    monkeypatch.setattr(cluster, "end_this_actor", found.ended.set)
    monkeypatch.setattr(cluster, "refuge", lambda: None)
    for name in ("GRACE", "_WATCH", "_ASK"):
        monkeypatch.setattr(actors, name, 0.05)
    return found


@pytest.fixture
def server(world: World) -> Iterator[Server]:
    found = Server(Counter, "counter", 0, {})
    found.start("1MiB")
    assert add(found, 1) == 1
    yield found
    end(found)


def end(server: Server) -> None:
    """End the thread of a server, which would otherwise use Ray when its stand-in is removed."""
    server._moved = True
    server._watcher.join(10)
    assert not server._watcher.is_alive()


def add(server: Server, number: int) -> Any:
    how, result = server.call("caller", number, "add", pickle.dumps(((), {})))
    return pickle.loads(result)[1] if how == SERVED else how


def move(server: Server, world: World, *replies: str | Exception) -> Successor:
    """Move to a successor that is killed after the commit. Raises the error of the move."""
    with receiver("resume") as address:
        successor = Successor(address, *replies)
        world.successors.append(successor)
        try:
            assert server.move("node") is None
        finally:
            assert successor.killed == (replies == (FAILED,))
    return successor


def test_successor_that_has_the_state_is_not_ended(server: Server, world: World) -> None:
    move(server, world, WAITING, ARRIVED)
    assert world.ended.wait(10)
    server._turn.release()  # what the calls that wait get, if this process were not ended
    assert add(server, 2) == REDIRECTED


def test_actor_continues_if_its_successor_has_failed(server: Server, world: World) -> None:
    with pytest.raises(MigrationError, match="cannot move counter: its successor has failed"):
        move(server, world, FAILED)
    assert add(server, 2) == 2
    with pytest.raises(MigrationError, match="cannot move counter: its successor has failed"):
        move(server, world, FAILED)


def test_unreachable_successor_is_kept_and_asked_until_it_replies(server: Server, world: World) -> None:
    with pytest.raises(OutcomeUnknown):
        move(server, world, ActorExited("no reply"), ActorExited("no reply"))
    successor = server._doubt[1] if server._doubt is not None else None
    assert isinstance(successor, Successor)
    with pytest.raises(OutcomeUnknown):  # no successor is started
        server.move("node")
    assert not successor.killed
    successor.replies = [FAILED]
    wait_until(lambda: successor.killed, "the end of the successor")
    assert add(server, 2) == 2


def test_successor_without_predecessor_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "ARRIVING", 0.5)
    successor = Server(Counter, "counter", 1, {})
    assert not world.ended.wait(1.0)
    assert successor.arrival() == WAITING
    world.generations.clear()
    assert world.ended.wait(10)
    end(successor)


def test_call_without_a_result_ends_after_the_timeout_of_the_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    class Actor:
        generation = 0

        def call(self, *arguments: Any) -> tuple[str, bytes]:
            assert 0.0 < arguments[-1] <= 5.0
            raise TimeoutError

    class Found:
        def __init__(self, _: str) -> None: ...

        def current(self, *_: Any) -> Actor:
            return Actor()

    monkeypatch.setattr(actors, "MovableActors", Found)
    handle: MovableHandle[Counter] = MovableHandle("counter", 5.0)
    with pytest.raises(CallTimeout, match=r"^cannot call add of counter: no result after 5 s \(`call_timeout`\)"):
        handle.call("add")
    assert issubclass(CallTimeout, FleetError)
