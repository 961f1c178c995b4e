"""Simulated hosts, agents and moves: they perform the actions of a controller, and report events to it.

The controller is `pageferry.fleet.execution.Execution`, or the first-fit of `naive`. Moves follow the phases of a
migration: set-up, rounds, pause, hand-over, and in post-copy the pages after it. A round takes as long as the shared
links require, and the next round sends what the workload has modified meanwhile.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from msgspec.structs import replace

from benchmarks.fleet.flows import Flows
from benchmarks.fleet.recorded import Recorded
from pageferry.fleet import costs, steps
from pageferry.fleet.costs import Costs
from pageferry.fleet.links import Network
from pageferry.fleet.model import Host, Limits, Move, View, Workload

LATENCY = 0.005
"""Time of a call to an agent, and of its reply, seconds."""
SETUP_BEFORE = 0.6
"""Part of the set-up before the first page; the rest follows the hand-over."""
STALLED = 4
"""Number of rounds without progress after which pre-copy fails (`pageferry.migration.convergence`)."""
MODEL = Costs()


class Controller(Protocol):
    """Part that decides which moves are started."""

    def start(self, now: float) -> list[steps.Action]:
        """Return the first actions."""

    def handle(self, event: steps.StepEvent, now: float) -> list[steps.Action]:
        """Return the actions after an event."""

    @property
    def wake_at(self) -> float | None:
        """Time of the next `Ticked`."""


@dataclass(slots=True)
class Live:
    """Move that runs, or whose outcome the source does not know."""

    move: Move
    attempt: int
    workload: Workload
    volume: float
    """Bytes of memory to send."""
    dirty: float
    late_downtime: float
    setup: float
    phase: str = "set-up"
    conducted: bool = True
    heard: bool = True
    rounds: int = 0
    round_began: float = 0.0
    paused_at: float = 0.0
    least: float = inf
    stalled: int = 0

    @property
    def after_commit(self) -> bool:
        """Whether the source has handed the workload over."""
        return self.phase in ("handed", "decided", "late")


@dataclass(slots=True)
class Outcome:
    """Figures of a simulation."""

    seconds: float = 0.0
    """Time at which the last move has ended."""
    moved: int = 0
    starts: int = 0
    failed: int = 0
    """Number of starts that were aborted."""
    downtimes: list[float] = field(default_factory=list)
    instructions: list[steps.GiveUp] = field(default_factory=list)
    control_cpu: float = 0.0
    """CPU time of the controller, seconds."""


class World:
    """Hosts, links and moves."""

    def __init__(self, view: View, controller: Controller, *, seed: int = 1) -> None:
        self.view = view
        self.controller = controller
        self.chance = random.Random(seed)
        self.now = 0.0
        self.outcome = Outcome()
        self.hosts: dict[str, Host] = {one.name: one for one in view.hosts}
        self.owner: dict[str, str | None] = {one.name: one.host for one in view.workloads}
        self.lives: dict[str, Live] = {}
        self.down: set[str] = set()
        self.full: set[str] = set()
        self.workloads = {one.name: one for one in view.workloads}
        self.network = Network(view, Limits(link_share=1.0))
        self.flows = Flows(self.network.capacity)
        self._recorded = Recorded.load()
        self._sizes = costs.image_sizes(view.images, view.workloads)
        self._fences: dict[str, int] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._residents: dict[str, set[str]] = {name: set() for name in self.hosts}
        for one in view.workloads:
            self._residents[one.host].add(one.name)

    # -- time

    def at(self, delay: float, what: Callable[[], None]) -> None:
        """Do something after a delay, seconds."""
        heapq.heappush(self._queue, (self.now + delay, next(self._number), what))

    def run(self, finished: Callable[[], bool]) -> Outcome:
        """Run until the controller has finished."""
        self._take(self.controller.start(self.now))
        while not finished():
            wake = self.controller.wake_at
            until = min(self._queue[0][0] if self._queue else inf, inf if wake is None else max(wake, self.now))
            transfer = self.now + self.flows.next_end()
            target = min(until, transfer)
            if target == inf:
                raise RuntimeError("the simulation waits for nothing")
            ended = self.flows.advance(target - self.now)
            self.now = target
            for name in ended:
                self._transferred(self.lives[name])
            while self._queue and self._queue[0][0] <= self.now:
                heapq.heappop(self._queue)[2]()
            if wake is not None and wake <= self.now:
                self._tell(steps.Ticked())
        return self.outcome

    def _tell(self, event: steps.StepEvent) -> None:
        self._take(self.controller.handle(event, self.now))

    def send(self, event: steps.StepEvent) -> None:
        """Send an event to the controller."""
        self.at(LATENCY, lambda: self._tell(event))

    def _take(self, actions: Iterable[steps.Action]) -> None:
        for action in actions:
            self.at(LATENCY, lambda action=action: self._perform(action))  # type: ignore[misc]

    def _perform(self, action: steps.Action) -> None:
        if isinstance(action, steps.StartMove):
            self._start(action)
        elif isinstance(action, steps.AskHost):
            down = action.host in self.down
            self.send(steps.HostLost(host=action.host) if down else self.report(action.host))
        elif isinstance(action, steps.Recover):
            self._recover(action)
        elif isinstance(action, steps.GiveUp):
            self.outcome.instructions.append(action)

    # -- moves

    def _start(self, action: steps.StartMove) -> None:
        move, name = action.move, action.move.workload
        self.outcome.starts += 1
        if move.source in self.down:
            self.send(steps.HostLost(host=move.source))
            self.send(steps.Ended(workload=name, attempt=action.attempt, outcome="unknown", reason="no agent"))
            return
        if self.owner[name] != move.source or name in self.lives:
            raise RuntimeError(f"{name} is moved from {move.source}, but {self.owner[name]} owns it")
        refused = move.destination in self.full or move.destination in self.down
        if refused or action.attempt <= self._fences.get(name, 0):
            cause: steps.Cause = "full" if move.destination in self.full else "connection-lost"
            self._aborted(name, action.attempt, cause)
            return
        workload = self.workloads[name]
        live = Live(
            move=move,
            attempt=action.attempt,
            workload=workload,
            volume=costs.occupied(workload, move.shares_base, self._sizes),
            dirty=workload.dirty_rate or 0,
            late_downtime=self._recorded.draw_downtime(self.chance, move.mode != "precopy"),
            setup=self._recorded.draw_setup(self.chance),
        )
        self.lives[name] = live
        self.send(steps.Begun(workload=name, attempt=action.attempt, migration=f"{name}/{action.attempt}"))
        self.at(live.setup * SETUP_BEFORE, lambda: self._begin(live))

    def _begin(self, live: Live) -> None:
        if not live.conducted:
            return
        if live.move.mode == "postcopy":
            self._pause(live, 0.0)
            return
        live.phase, live.round_began = "round", self.now
        self._transfer(live, live.volume)

    def _transfer(self, live: Live, size: float) -> None:
        limit = min(live.move.rate or inf, MODEL.rate)
        path = self.network.path(live.move.source, live.move.destination)
        self.flows.add(live.workload.name, path.directions, limit, size * MODEL.overhead)

    def _transferred(self, live: Live) -> None:
        """A round, the pages of the pause, or the pages after the hand-over were sent."""
        if live.phase == "round":
            self._after_round(live)
        elif live.phase == "pause":
            self.flows.remove(live.workload.name)
            self.at(live.late_downtime / 2, lambda: self._hand_over(live))
        elif live.phase == "late":
            self._complete(live)

    def _after_round(self, live: Live) -> None:
        rate = self.flows.rate_of(live.workload.name)
        left = min(live.dirty * (self.now - live.round_began), live.volume)
        live.rounds += 1
        live.round_began = self.now
        if left <= rate * MODEL.max_downtime:
            self._pause(live, left)
            return
        live.stalled = live.stalled + 1 if left >= 0.9 * live.least else 0
        live.least = min(live.least, left)
        if live.move.mode == "hybrid":
            live.volume = left
            self._pause(live, 0.0)
        elif live.stalled and live.move.auto_converge:
            live.dirty *= 0.7
            self._transfer(live, left)
        elif live.stalled >= STALLED or live.rounds >= MODEL.max_rounds:
            self._abort(live, "not-converging")
        else:
            self._transfer(live, left)

    def _pause(self, live: Live, left: float) -> None:
        live.phase, live.paused_at = "pause", self.now
        self._transfer(live, left)

    def _hand_over(self, live: Live) -> None:
        if live.conducted:
            live.phase, self.owner[live.workload.name] = "handed", None
            self.at(live.late_downtime / 2, lambda: self._decide(live))

    def _decide(self, live: Live) -> None:
        if not live.conducted:
            return
        live.phase = "decided"
        self._own(live.workload.name, live.move.destination)
        self.outcome.downtimes.append(self.now - live.paused_at)
        late = (live.move.mode != "precopy" and live.least < inf) or live.move.mode == "postcopy"
        if late:
            live.phase = "late"
            self._transfer(live, live.volume)
        else:
            self.at(live.setup * (1 - SETUP_BEFORE), lambda: self._complete(live))

    def _own(self, name: str, host: str) -> None:
        for other in (self.lives[name].move.source, self.lives[name].move.destination):
            self._residents[other].discard(name)
        self._residents[host].add(name)
        self.owner[name] = host

    def _complete(self, live: Live) -> None:
        name = live.workload.name
        self.flows.remove(name)
        if not live.conducted or self.lives.get(name) is not live:
            return
        del self.lives[name]
        self._moved()
        if live.heard:
            self.send(steps.Ended(workload=name, attempt=live.attempt, outcome="done"))

    def _moved(self) -> None:
        self.outcome.moved += 1
        self.outcome.seconds = self.now

    def _abort(self, live: Live, cause: steps.Cause) -> None:
        name = live.workload.name
        self.flows.remove(name)
        live.conducted = False
        del self.lives[name]
        self.outcome.failed += 1
        if live.heard:
            self._aborted(name, live.attempt, cause)

    def _aborted(self, name: str, attempt: int, cause: steps.Cause) -> None:
        self.send(steps.Ended(workload=name, attempt=attempt, outcome="aborted", cause=cause, reason=cause))

    # -- hosts

    def report(self, name: str) -> steps.Reported:
        """Return the state of a host."""
        found = [
            replace(self.workloads[one], host=name, status=self._status(one, name)) for one in self._residents[name]
        ]
        return steps.Reported(host=self.hosts[name], workloads=tuple(found))

    def _status(self, name: str, host: str) -> str:
        live = self.lives.get(name)
        if live is None:
            return "running"
        return "busy" if live.conducted else "unknown"

    def _recover(self, action: steps.Recover) -> None:
        name, live = action.workload, self.lives.get(action.workload)
        if action.source in self.down:
            self.send(steps.HostLost(host=action.source))
            return
        self._fences[name] = max(action.attempt, self._fences.get(name, 0))
        owner: steps.Owner = "unknown"
        if live is None:
            owner = "source" if self.owner[name] == action.source else "absent"
        elif not live.conducted and live.move.destination not in self.down:
            owner = "destination" if live.phase in ("decided", "late") else "source"
            self._own(name, live.move.destination if owner == "destination" else live.move.source)
            del self.lives[name]
            if owner == "destination":
                self._moved()
        self.send(steps.Recovered(workload=name, attempt=action.attempt, owner=owner))

    # -- failures

    def fail(self, live: Live, cause: steps.Cause) -> None:
        """Let a move fail: before its commit it is aborted, later its outcome is unknown."""
        name = live.workload.name
        if not live.conducted or self.lives.get(name) is not live:
            return
        if not live.after_commit:
            self._abort(live, cause)
            return
        live.conducted = False
        self.flows.remove(name)
        if live.heard:
            self.send(steps.Ended(workload=name, attempt=live.attempt, outcome="unknown", reason=cause))

    def lose(self, host: str) -> None:
        """Cut a host off: its moves fail, and its agent does not reply. Its workloads keep running."""
        self.down.add(host)
        for live in [one for one in self.lives.values() if host in (one.move.source, one.move.destination)]:
            live.heard = live.heard and live.move.source != host
            self.fail(live, "connection-lost")
        self.send(steps.HostLost(host=host))

    def find(self, host: str) -> None:
        """Connect a host again."""
        self.down.discard(host)
        self.send(self.report(host))

    def restart_head(self) -> None:
        """Lose all calls of the driver. The moves continue."""
        for live in self.lives.values():
            live.heard = False
        self._tell(steps.HeadRestarted())
