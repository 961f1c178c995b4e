"""Driver of a plan: performs the actions of the state machine (`execution`) by calls to the agents of the hosts.

The state machine decides what is done. The driver reports to it what the hosts report, and the time. If the driver is
killed, moves that run continue on their hosts, and each of them ends with one owner; no further move is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any

from pageferry.errors import PageferryError
from pageferry.events import Listener
from pageferry.fleet.cluster import Cluster
from pageferry.fleet.events import FleetMoveEvent, MoveResult, Phase
from pageferry.fleet.execution import Execution
from pageferry.fleet.model import Move, Plan, Unplaced, View
from pageferry.fleet.mover import Attempt
from pageferry.fleet.steps import (
    Action,
    AskHost,
    Begun,
    CancelMove,
    CancelRequested,
    Ended,
    GiveUp,
    HostLost,
    Progressed,
    Recover,
    Recovered,
    Reported,
    StartMove,
    StepEvent,
    Ticked,
)
from pageferry.fleet.tasks import Task
from pageferry.fleet.view import host_of, operations_of

_OUTCOMES: dict[str, Phase] = {"source": "aborted", "destination": "done"}


class Driver:
    """Driver of one plan."""

    def __init__(self, cluster: Cluster, view: View, plan: Plan, listener: Listener) -> None:
        self._cluster = cluster
        self._listener = listener
        self._begun = time.monotonic()
        self._execution = Execution(view, plan)
        self._events: asyncio.Queue[StepEvent] = asyncio.Queue()
        self._attempts: dict[tuple[str, int], Attempt] = {}
        self._starts: dict[tuple[str, int], int] = {}
        """Number of starts of a workload until a start, which the state machine numbers in the whole plan."""
        self._running: set[asyncio.Task[None]] = set()
        self._times: dict[str, tuple[float, float]] = {}
        """Start and end of the last attempt of each workload, seconds since the start of the plan."""
        self._unplaced: list[Unplaced] = []

    async def run(self) -> tuple[list[MoveResult], list[Unplaced]]:
        """Carry out the plan. Return the results of its moves, and the workloads for which an operator must act.

        On cancellation, cancel the moves that run, and wait until the owner of each workload is known.
        """
        loop = asyncio.ensure_future(self._loop())
        try:
            while not loop.done():
                try:
                    await asyncio.shield(loop)
                except asyncio.CancelledError:
                    self._events.put_nowait(CancelRequested())
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
        loop.result()
        if self._execution.cancelled:
            raise asyncio.CancelledError
        return [self._result(one) for one in self._execution.tasks.values()], self._unplaced

    @property
    def _now(self) -> float:
        return time.monotonic() - self._begun

    async def _loop(self) -> None:
        self._perform(self._execution.start(self._now))
        while not self._execution.finished:
            event: StepEvent = Ticked()
            with contextlib.suppress(TimeoutError):
                wake_at = self._execution.wake_at
                async with asyncio.timeout(None if wake_at is None else max(0.0, wake_at - self._now)):
                    event = await self._events.get()
            self._report(event)
            self._perform(self._execution.handle(event, self._now))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartMove():
                    self._start(action)
                case CancelMove():
                    self._spawn(self._attempts[action.workload, action.attempt].cancel())
                case Recover():
                    self._spawn(self._recover(action))
                case AskHost():
                    self._spawn(self._ask(action.host))
                case GiveUp():
                    task = self._execution.tasks[action.workload]
                    given_up = Unplaced(workload=action.workload, reason=action.reason, remedy=action.remedy)
                    self._unplaced = [one for one in self._unplaced if one.workload != action.workload] + [given_up]
                    self._emit(task.move, task.attempt, "given-up", reason=action.reason)

    def _start(self, action: StartMove) -> None:
        attempt = Attempt(self._cluster, action.move, action.attempt, self._events.put_nowait)
        self._attempts[action.move.workload, action.attempt] = attempt
        self._times[action.move.workload] = (self._now, self._now)
        self._emit(action.move, action.attempt, "receiving")
        self._spawn(self._attempt(attempt))

    async def _attempt(self, attempt: Attempt) -> None:
        self._events.put_nowait(await attempt.run())

    async def _recover(self, action: Recover) -> None:
        attempt = self._attempts[action.workload, action.attempt]
        self._emit(attempt.move, action.attempt, "recovering")
        self._events.put_nowait(await attempt.recover())

    async def _ask(self, host: str) -> None:
        try:
            report = await self._cluster.report(host)
        except PageferryError as error:
            self._events.put_nowait(HostLost(host=host, reason=str(error)))
            return
        operations = tuple(operations_of(report))
        self._events.put_nowait(Reported(host=host_of(report), workloads=report.workloads, operations=operations))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    # -- events and results

    def _report(self, event: StepEvent) -> None:
        """Report an event of a move to the listener."""
        match event:
            case Begun(workload=name, attempt=number):
                self._of(name, number, "moving")
            case Progressed(workload=name, attempt=number, fraction=fraction):
                self._of(name, number, "progress", fraction=fraction)
            case Ended(workload=name, attempt=number, outcome=outcome, reason=reason):
                self._of(name, number, outcome, reason=reason)
            case Recovered(workload=name, attempt=number, owner=owner, reason=reason):
                self._of(name, number, _OUTCOMES.get(owner, "unknown"), reason=reason)

    def _of(self, name: str, number: int, phase: Phase, *, fraction: float | None = None, reason: str = "") -> None:
        attempt = self._attempts[name, number]
        if phase in ("done", "aborted", "unknown"):
            self._times[name] = (self._times[name][0], self._now)
        self._emit(attempt.move, number, phase, fraction=fraction, reason=reason)

    def _emit(self, move: Move, number: int, phase: Phase, *, fraction: float | None = None, reason: str = "") -> None:
        starts = self._starts.setdefault((move.workload, number), self._execution.tasks[move.workload].starts)
        event = FleetMoveEvent(
            at=self._now,
            workload=move.workload,
            source=move.source,
            destination=move.destination,
            attempt=starts,
            phase=phase,
            fraction=fraction,
            reason=reason,
        )
        self._listener(event)

    def _result(self, task: Task) -> MoveResult:
        started, ended = self._times.get(task.name, (0.0, 0.0))
        attempt = self._attempts.get((task.name, task.attempt))
        found = attempt.result if attempt is not None and task.state == "done" else None
        clone = (found or {}).get("clone") or {}
        return MoveResult(
            workload=task.name,
            source=task.move.source,
            destination=task.move.destination,
            outcome="done" if task.state == "done" else "unknown" if task.unresolved else "aborted",
            attempts=task.starts,
            started=started,
            ended=ended,
            mode=task.move.mode if task.starts else None,
            downtime=None if found is None else float(found["downtime"]) / 1e3,
            transferred=None if found is None else int(found["transferred"]),
            shares_base=bool(clone.get("shared")),
            reason="" if task.state == "done" else task.reason,
        )
