"""Actors of Ray whose memory is moved to another node while they serve calls: `Movable`.

The state of a movable actor is an arena with arrays (`pageferry.Arrays`). It is moved by a migration: the successor is
started first, on the other node, and receives the arena while the actor serves calls. The pause of the migration is the
pause of the actor.

A caller has a `MovableHandle`, which can be pickled. It gives each call a number. With the arena, the actor passes on
the number and the result of the last call of each handle. A call that a handle repeats after a move is therefore
executed exactly once: either it was executed before the pause, and its result has been moved, or it was not.

If an actor exits without a successor, the handle raises ActorLost: the call may have been executed or not.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Generic, TypeVar, Unpack

import pageferry
from pageferry import values
from pageferry.errors import ActorLost, CallTimeout, FleetError, MigrationError, OutcomeUnknown, UsageError
from pageferry.fleet import cluster
from pageferry.fleet.cluster import MovableActor, MovableActors
from pageferry.fleet.options import MovableArguments, MovableOptions
from pageferry.host.registry import check_name
from pageferry.migration.events import MigrationResult
from pageferry.objects.arrays import Arrays

T = TypeVar("T", bound="Movable")

ARRIVING = 60.0
"""Seconds for which a successor waits for the state, and a handle for a successor."""
GRACE = 5.0
"""Seconds for which an actor that has moved redirects calls, before it ends."""
_ASK = 0.1
"""Seconds between two questions to a successor whether the state has arrived."""
_WATCH = 1.0
"""Seconds between two requests for the list of draining nodes."""

SERVED, REDIRECTED, LOST = "served", "redirected", "lost"
ARRIVED, FAILED, WAITING = "arrived", "failed", "waiting"


class Movable:
    """Base class of actors whose state is in arrays that move with them.

    A subclass defines `open`, which gets the arrays when the actor starts, and after each move. Its other public
    methods can be called by a `MovableHandle`. Only the arrays are moved: `open` must set all other attributes. Calls
    are executed one at a time.
    """

    def open(self, arrays: Arrays) -> None:
        """Use `arrays`. They are empty when the actor is first started, and complete after a move."""
        raise NotImplementedError


class Server:
    """One process of a movable actor: the first one, or the successor of another one."""

    def __init__(self, kind: type[Movable], name: str, generation: int, trust: dict[str, Any]) -> None:
        self._kind = kind
        self._name = name
        self._generation = generation
        self._successor = generation
        """Generation of the last successor that was started."""
        self._trust = trust
        self._turn = threading.Lock()
        """Lock that is held during each call, and during the pause of a migration."""
        self._answered: dict[str, tuple[int, bytes]] = {}
        """Number and result of the last call of each handle."""
        self._arrived = threading.Event()
        self._failure = ""
        self._owns = generation == 0
        """Whether this process has become the owner of the state."""
        self._moved = False
        self._doubt: tuple[OutcomeUnknown, MovableActor] | None = None
        """Move whose outcome is unknown, with the successor."""
        self._moving = threading.Lock()
        self._arrays: Arrays | None = None
        self._object: Movable | None = None
        self._address = ""
        self._listening = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="pageferry-drain", daemon=True)
        self._watcher.start()

    # -- start

    def start(self, size: int | str) -> None:
        """Create the state, and serve calls."""
        self._serve(Arrays(size, **self._options()))

    def receive(self) -> str:
        """Wait for the state of the predecessor in the background. Return the address of the receiver."""
        threading.Thread(target=self._receive, name="pageferry-receive", daemon=True).start()
        self._listening.wait(ARRIVING)
        if not self._address:
            raise FleetError(f"cannot receive {self._name}: {self._failure or 'the receiver does not listen'}")
        return self._address

    def _receive(self) -> None:
        try:
            arena = pageferry.receive(
                f"{cluster.node_address()}:0", listening=self._listen, **self._trust, **self._options()
            )
            self._owns = True
            self._serve(Arrays.over(arena))
        except Exception as error:
            self._failure = str(error) or type(error).__name__
            self._listening.set()
            self._arrived.set()

    def arrival(self) -> str:
        """Return whether the state of the predecessor has arrived: ARRIVED, FAILED (it never will), or WAITING."""
        if self._owns:
            return ARRIVED
        return FAILED if self._failure else WAITING

    def _listen(self, address: str) -> None:
        self._address = address
        self._listening.set()

    def _serve(self, arrays: Arrays) -> None:
        found = self._kind()
        found.open(arrays)
        self._arrays, self._object = arrays, found
        self._arrived.set()

    def _options(self) -> Any:
        return {"state": (self._save, self._load), "on_pause": self._turn, "on_moved": self._leave, "direct_io": False}

    def _save(self) -> bytes:
        return pickle.dumps(self._answered)

    def _load(self, state: bytes) -> None:
        # The peer is authenticated, and is an actor of the same cluster, which executes the code of its clients anyway.
        self._answered = pickle.loads(state)

    def _leave(self) -> None:
        self._moved = True

    # -- calls

    def call(self, client: str, number: int, method: str, arguments: bytes) -> tuple[str, bytes]:
        """Execute a call, unless it was executed before. Return how it has ended, and the pickled result."""
        if not self._arrived.wait(ARRIVING) or self._object is None:
            return LOST, pickle.dumps(self._failure)
        with self._turn:
            if self._moved:
                return REDIRECTED, b""
            last, result = self._answered.get(client, (0, b""))
            if number > last:
                result = self._execute(method, arguments)
                self._answered[client] = (number, result)
            return SERVED, result

    def _execute(self, method: str, arguments: bytes) -> bytes:
        try:
            positional, named = pickle.loads(arguments)
            return pickle.dumps((True, getattr(self._object, method)(*positional, **named)))
        except Exception as error:
            return pickle.dumps((False, error))

    # -- moves

    def move(self, node: str) -> MigrationResult | None:
        """Move to another node of Ray: start the successor there, and migrate the state. Return None if this process
        has moved. Raises MigrationError, FleetError; this process then keeps serving, except after OutcomeUnknown: the
        successor could not be asked whether it has the state, and no further move is started."""
        self._arrived.wait(ARRIVING)
        with self._moving:
            if self._moved:
                return None
            if self._arrays is None:
                raise FleetError(f"cannot move {self._name}: its state has not arrived: {self._failure}")
            if self._doubt is not None:
                raise self._doubt[0]
            self._successor += 1  # a failed move leaves its name for a moment
            arguments = (self._kind, self._name, self._successor, self._trust)
            successor = MovableActors(self._name).start(Server, node, self._successor, arguments)
            try:
                address = successor.receive()
                result = pageferry.migrate(self._arrays, address, **_of_source(self._trust))
            except OutcomeUnknown as doubt:
                self._doubt = (doubt, successor)
                self._resolve()
                return None
            except BaseException:
                if not self._moved:
                    successor.kill()
                raise
        threading.Timer(GRACE, cluster.end_this_actor).start()
        return result

    def _resolve(self) -> None:
        """Resolve a move whose outcome is unknown, from the reply of the successor. If it has the state, end this
        process; if it will never have it, continue here. Raises MigrationError in the latter case. Without a reply,
        either process may own the state: keep both, and raise OutcomeUnknown."""
        assert self._doubt is not None
        doubt, successor = self._doubt
        how, end = WAITING, time.monotonic() + ARRIVING
        try:
            while how == WAITING and time.monotonic() < end:
                how = successor.arrival()
                time.sleep(_ASK)
        except FleetError as silent:
            raise doubt from silent
        if how == WAITING:
            raise doubt
        if how == ARRIVED:
            self._moved, self._doubt = True, None
            threading.Timer(GRACE, cluster.end_this_actor).start()
            return
        assert self._arrays is not None
        pageferry.take_back(self._arrays, doubt)
        self._doubt = None
        successor.kill()
        raise MigrationError(f"cannot move {self._name}: its successor has failed: {doubt}") from doubt

    def _watch(self) -> None:
        """Move to another node when Ray drains this one. Resolve an unknown outcome. End this process if its
        predecessor has exited without having sent the state."""
        alone = 0
        while not self._moved:
            time.sleep(_WATCH)
            with contextlib.suppress(Exception):
                if self._moved:
                    return
                if not self._owns:
                    alone = alone + 1 if self._is_alone() else 0
                    if alone * _WATCH >= ARRIVING:
                        cluster.end_this_actor()
                elif self._doubt is not None:
                    with self._moving:
                        self._resolve()
                elif (node := cluster.refuge()) is not None and self._arrays is not None:
                    self.move(node)

    def _is_alone(self) -> bool:
        """Return whether no predecessor exists."""
        return not MovableActors(self._name).exists(before=self._generation)


def _of_source(trust: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in trust.items() if name in ("tls", "insecure", "timeout")}


class MovableHandle(Generic[T]):
    """Handle of a movable actor, for one caller: each call of it is executed exactly once in planned moves.

    A handle can be pickled; each copy is a separate caller. Calls of one handle are made one after the other.
    """

    def __init__(self, name: str, call_timeout: float = ARRIVING) -> None:
        self._name = name
        self._timeout = call_timeout
        self._client = uuid.uuid4().hex
        self._number = 0
        self._lock = threading.Lock()
        self._actors = MovableActors(name)

    def __reduce__(self) -> tuple[Callable[..., MovableHandle[T]], tuple[str, float]]:
        return MovableHandle, (self._name, self._timeout)

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the actor, and return its result. Raises its error.

        Raises ActorLost if the actor has exited without a successor, CallTimeout if there is no result after
        `call_timeout` seconds. The call may have been executed or not; a further call does not repeat it.
        """
        if method.startswith("_") or method == "open":
            raise UsageError(f"invalid method {method!r}: expected the name of a public method")
        sent = pickle.dumps((arguments, named))
        with self._lock:
            self._number += 1
            succeeded, result = pickle.loads(self._sent(self._number, method, sent))
        if not succeeded:
            raise result
        return result

    def move(self, host: str) -> MigrationResult:
        """Move the actor to a host of the fleet (`pageferry fleet join`), or to a node of Ray, given by its id.

        Calls of handles are served meanwhile. Raises MigrationError, FleetError; the actor then stays where it is.
        """
        node, result, after = cluster.node_of(host), None, -1
        while result is None:
            actor = self._actors.current(self._timeout, after)
            try:
                result = actor.move(node)
            except cluster.ActorExited:
                if not self._actors.exists(actor.generation):
                    raise
            after = actor.generation
        return result

    def stop(self) -> None:
        """End the actor. Its state is lost."""
        self._actors.kill()

    def _sent(self, number: int, method: str, arguments: bytes) -> bytes:
        """Send a call until an actor has served it. Raises ActorLost, CallTimeout."""
        after = -1
        end = time.monotonic() + self._timeout
        while True:
            try:
                actor = self._actors.current(self._timeout if after < 0 else max(0.0, end - time.monotonic()), after)
            except cluster.ActorExited as error:
                raise ActorLost(
                    f"cannot call {method} of {self._name}: {error}; the call was not executed: restore the actor from "
                    "a checkpoint, or start it again"
                ) from error
            try:
                how, result = actor.call(self._client, number, method, arguments, max(0.0, end - time.monotonic()))
            except TimeoutError as slow:
                raise CallTimeout(
                    f"cannot call {method} of {self._name}: no result after {self._timeout:g} s (`call_timeout`); it "
                    "may be executed or not: see `ray list actors`, or use a handle with a longer timeout"
                ) from slow
            except cluster.ActorExited as error:
                after = actor.generation
                if not self._actors.exists(after):
                    raise ActorLost(
                        f"cannot call {method} of {self._name}: {error}; the call may have been executed or not: "
                        "restore the actor from a checkpoint, or start it again"
                    ) from error
                continue
            if how == SERVED:
                return result
            if how == LOST:
                reason = pickle.loads(result)
                raise ActorLost(f"cannot call {method} of {self._name}: its state did not arrive: {reason}")
            after = actor.generation


def start_movable(kind: type[T], name: str, size: int | str, **options: Unpack[MovableArguments]) -> MovableHandle[T]:
    """Start a movable actor in a cluster of Ray, and return a handle of it.

    `kind`: a subclass of `Movable`. `name`: unique in the cluster. `size`: size of its arrays, bytes, or a text such as
    `2GiB`. `options` are the fields of `pageferry.fleet.options.MovableOptions`: host (of the fleet, or id of a node of
    Ray; default: this node), address (default: the cluster of this process), insecure (which also allows moves without
    TLS), tls (directory of certificates on every node, docs/tls.md).

    Raises UsageError, FleetError.

    Examples:
        >>> import pageferry
        >>> class Counter(pageferry.fleet.Movable):
        ...     def open(self, arrays):
        ...         self.count = arrays["count"] if "count" in arrays else arrays.zeros("count", 1, "i8")
        ...     def add(self, number):
        ...         self.count[0] += number
        ...         return int(self.count[0])
        >>> pageferry.fleet.start_movable(Counter, "counter", "1MiB", address="127.0.0.1:1")  # no cluster there
        Traceback (most recent call last):
        pageferry.errors.FleetError: cannot connect to Ray at 127.0.0.1:1: ...
    """
    chosen = values.options(MovableOptions, options)
    check_name(name)
    if not issubclass(values.instance("kind", kind, type), Movable):
        raise UsageError(f"invalid `kind` {kind!r}: expected a subclass of pageferry.fleet.Movable")
    cluster.ensure_connected(chosen.address, insecure=chosen.insecure)
    trust: dict[str, Any] = {"insecure": chosen.insecure, "tls": None if chosen.tls is None else str(chosen.tls)}
    actor = MovableActors(name).start(Server, cluster.node_of(chosen.host), 0, (kind, name, 0, trust))
    actor.call_start(size)
    return MovableHandle(name)
