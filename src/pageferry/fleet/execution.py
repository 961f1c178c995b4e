"""State machine that carries out a plan.

`Execution.handle` takes an event and the time, and returns actions (`steps`). It performs no I/O and reads no clock.
The driver of real moves and the simulation use the same class. These rules hold:

1. A move is started only while its workload has a known owner, the source, and no earlier start is unresolved.
2. A move whose outcome is unknown is resolved by the hosts: the source is asked whether the move still runs. If it does
   not, the source recovers it. If the source does not have the workload, it is searched at the destination. The
   execution never concludes from silence that a host does not run a workload.
3. Until then, the workload counts on both hosts: in their memory, and in their anti-affinity groups.
4. A failed move is started again, up to `Limits.attempts` times: at another destination, or in another mode if it did
   not converge. After that, and if no host is suitable, the workload stays at the source, and `GiveUp` states what an
   operator must do.
5. If no event is to be expected, nothing waits: every workload has moved, was given up, or is stuck with an
   instruction.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import ClassVar

from msgspec.structs import replace

from pageferry.fleet import costs, movable, remedies
from pageferry.fleet.admission import Admission, Grant, Request, Resource
from pageferry.fleet.capacity import Capacity
from pageferry.fleet.costs import Costs, Load
from pageferry.fleet.links import Network
from pageferry.fleet.model import Limits, Mode, Move, Plan, View, Workload
from pageferry.fleet.steps import (
    Action,
    AskHost,
    Begun,
    CancelMove,
    CancelRequested,
    Cause,
    Ended,
    GiveUp,
    HeadRestarted,
    HostLost,
    Progressed,
    Recover,
    Recovered,
    Reported,
    StartMove,
    StepEvent,
    Ticked,
)
from pageferry.fleet.substitutes import Substitutes
from pageferry.fleet.tasks import ENDED, State, Task

RETRY_DELAY = 1.0
"""Time until the first retry, seconds. It doubles with every retry."""
QUESTION_INTERVAL = 5.0
"""Time after which a question or a recovery without a reply is repeated, seconds."""
FINAL: frozenset[Cause] = frozenset({"unsupported", "workload-died", "cancelled"})
"""Causes after which a move is not started again."""
OTHER_MODES: Mapping[Mode, tuple[Mode, ...]] = {
    "precopy": ("hybrid", "postcopy"),
    "hybrid": ("postcopy",),
    "postcopy": (),
}
"""Modes to try after a move that did not converge."""


class Execution:
    """Execution of the moves of a plan."""

    def __init__(self, view: View, plan: Plan, *, model: Costs | None = None, first_attempt: int = 1) -> None:
        """`first_attempt`: number of the first start. It must be greater than the numbers of earlier executions in the
        same fleet, so that an agent can reject starts that are out of date."""
        self.limits: Limits = plan.limits
        self.cancelled = False
        self._model = model or Costs()
        self._capacity = Capacity(view)
        self._network = Network(view, plan.limits)
        self._admission = Admission(self._network, plan.limits, self._model, self._missing)
        workloads = {workload.name: workload for workload in view.workloads}
        self.tasks: dict[str, Task] = {
            move.workload: Task(workload=workloads[move.workload], move=move, priority=number, owner=move.source)
            for number, move in enumerate(plan.moves)
        }
        """Workloads of the plan, by name."""
        sources = {move.source for move in plan.moves}
        self._substitutes = Substitutes(view, self._capacity, sources)
        self._by_source: dict[str, list[Task]] = {}
        for task in self.tasks.values():
            self._by_source.setdefault(task.move.source, []).append(task)
        self._absent: set[str] = set()
        """Names of the tasks whose source has replied to a recovery that it does not have the workload."""
        self._others: dict[str, dict[str, Workload]] = {}
        """Workloads by host and name that do not belong to the plan."""
        for one in view.workloads:
            if one.name not in self.tasks:
                self._others.setdefault(one.host, {})[one.name] = one
        self._lost: dict[str, float] = {host.name: 0.0 for host in view.hosts if not host.reachable}
        """Unreachable hosts, each with the time at which it was lost."""
        self._attempt = first_attempt - 1
        self._timers: list[tuple[float, int, str]] = []
        self._timer_number = 0
        self._open = set(self.tasks)
        """Names of the tasks that have not ended."""
        self._actions: list[Action] = []
        self._now = 0.0

    # -- interface of the driver

    @property
    def finished(self) -> bool:
        """Whether every workload has moved, was given up, or is stuck until an operator acts."""
        return not self._open

    @property
    def wake_at(self) -> float | None:
        """Time at which the driver must pass `Ticked`; None if it need not."""
        while self._timers and self._timers[0][2] not in self._open:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    @property
    def owners(self) -> dict[str, str | None]:
        """Known owners of the workloads; None for a workload whose move has an unknown outcome."""
        return {name: task.owner for name, task in self.tasks.items()}

    def start(self, now: float) -> list[Action]:
        """Begin the execution, and return the first actions. `now`: time in seconds, of any clock that only
        increases."""
        self._now = now
        self._lost = dict.fromkeys(self._lost, now)
        for task in self.tasks.values():
            self._submit(task)
        return self._act()

    def handle(self, event: StepEvent, now: float) -> list[Action]:
        """Take an event, and return the actions that follow. Events about a move that has been resolved, and repeated
        events, have no effect."""
        self._now = max(now, self._now)
        self._handlers[type(event)](self, event)
        return self._act()

    # -- events

    def _on_begun(self, event: Begun) -> None:
        task = self._current(event.workload, event.attempt)
        if task is not None:
            task.heard, task.migration = self._now, event.migration or task.migration

    def _on_progressed(self, event: Progressed) -> None:
        task = self._current(event.workload, event.attempt)
        if task is not None:
            task.heard = task.doubted = self._now

    def _on_ended(self, event: Ended) -> None:
        task = self._current(event.workload, event.attempt)
        if task is None:
            return
        if event.outcome == "done":
            self._done(task)
        elif event.outcome == "aborted":
            self._aborted(task, event.cause, event.reason)
        else:
            if event.cause == "cancelled":
                task.cause = event.cause
            if task.state == "moving":
                task.reason = event.reason
                self._doubt(task)

    def _on_recovered(self, event: Recovered) -> None:
        task = self._current(event.workload, event.attempt)
        if task is None or not task.unresolved:
            return
        if event.owner == "destination":
            self._done(task)
        elif event.owner == "source":
            self._aborted(task, task.cause, task.reason or event.reason)
        elif event.owner == "absent":
            self._absent.add(task.name)
            if task.state != "stuck":
                task.state = "searching"
            self._ask(task, task.move.destination)
        else:
            # The next timer repeats the question, until `host_timeout` has passed.
            task.reason = event.reason or task.reason
            if task.state != "stuck":
                task.state = "asking"

    def _on_reported(self, event: Reported) -> None:
        name = event.host.name
        if name not in self._capacity.rooms:
            return
        self._lost.pop(name, None)
        self._capacity.rooms[name].host = event.host
        self._update_others(event)
        running = {one.workload for one in event.operations if one.outcome is None}
        running |= {one.name for one in event.workloads if one.status == "busy"}
        present = {one.name: one for one in event.workloads}
        for task in self._by_source.get(name, ()):
            self._source_reported(task, present.get(task.name), task.name in running)
        for task in [self.tasks[one] for one in sorted(self._absent)]:
            if task.move.destination == name and task.name not in running:
                self._destination_reported(task, present.get(task.name))
        self._wake(name)

    def _on_host_lost(self, event: HostLost) -> None:
        self._lost.setdefault(event.host, self._now)
        for task in [one for one in self.tasks.values() if one.state not in ENDED]:
            if task.move.source == event.host and task.state == "moving":
                task.reason = event.reason or f"the agent of {event.host} does not reply"
                self._doubt(task)
            elif task.move.destination == event.host and task.state == "waiting":
                self._redirect(task)
            if event.host in (task.move.source, task.move.destination):
                self._set_timer(task, self._now + self.limits.host_timeout)

    def _on_head_restarted(self, _: HeadRestarted) -> None:
        for task in self.tasks.values():
            if task.state == "stuck":
                self._actions.append(AskHost(host=task.move.source))
            elif task.state == "moving" or task.unresolved:
                task.reason = task.reason or "the driver has lost its calls to the agents"
                self._doubt(task)

    def _on_cancel_requested(self, _: CancelRequested) -> None:
        self.cancelled = True
        for task in list(self.tasks.values()):
            if task.state == "waiting":
                self._give_up(task, "the plan was cancelled", remedies.of_failure(task, "cancelled"))
            elif task.state in ("moving", "asking"):
                self._actions.append(CancelMove(workload=task.name, source=task.move.source, attempt=task.attempt))

    def _on_ticked(self, _: Ticked) -> None:
        due = set()
        while self._timers and self._timers[0][0] <= self._now:
            due.add(heapq.heappop(self._timers)[2])
        for name in sorted(due & self._open):
            self._check(self.tasks[name])

    _handlers: ClassVar[Mapping[type[StepEvent], Callable[..., None]]] = {
        Begun: _on_begun,
        Progressed: _on_progressed,
        Ended: _on_ended,
        Recovered: _on_recovered,
        Reported: _on_reported,
        HostLost: _on_host_lost,
        HeadRestarted: _on_head_restarted,
        CancelRequested: _on_cancel_requested,
        Ticked: _on_ticked,
    }

    def _current(self, name: str, attempt: int) -> Task | None:
        """Return the task of an event; None if the event belongs to a start that was resolved."""
        task = self.tasks.get(name)
        current = task is not None and task.attempt == attempt and (task.state == "moving" or task.unresolved)
        return task if current else None

    # -- resolving an unknown outcome

    def _doubt(self, task: Task) -> None:
        """Begin to resolve a move whose outcome is unknown."""
        task.owner, task.doubted, task.state = None, self._now, "asking"
        self._absent.discard(task.name)
        self._ask(task, task.move.source)

    def _ask(self, task: Task, host: str) -> None:
        task.heard = self._now
        self._actions.append(AskHost(host=host))
        self._set_timer(task, self._now + QUESTION_INTERVAL)

    def _source_reported(self, task: Task, found: Workload | None, running: bool) -> None:
        """Take a report of the source about one of its workloads."""
        if task.state == "waiting":
            self._check_waiting(task, found)
        elif task.state in ("asking", "stuck") and running:
            # The move continues. Its end is found by the next question, if the driver does not report it.
            task.doubted = self._now
            self._reopen(task, "asking")
        elif task.state in ("asking", "stuck"):
            self._reopen(task, "recovering")
            self._actions.append(
                Recover(
                    workload=task.name,
                    source=task.move.source,
                    destination=task.move.destination,
                    attempt=task.attempt,
                    migration=task.migration,
                )
            )

    def _check_waiting(self, task: Task, found: Workload | None) -> None:
        """Give up a waiting workload that is not on its source any longer, or cannot be moved now."""
        if found is None:
            self._give_up(task, f"it is not on {task.move.source} any longer", "plan again, if it runs on another host")
            return
        if found.status == "busy" or (found.status == "unknown" and task.starts):
            return  # the report may be older than the end of the last start
        obstacle = movable.obstacle(found, self._capacity.rooms[task.move.source].host, None)
        if obstacle is not None:
            self._give_up(task, *obstacle)
            return
        self._capacity.remove(task.workload, task.move.source)
        task.workload = found
        self._capacity.add(found, task.move.source)

    def _destination_reported(self, task: Task, found: Workload | None) -> None:
        """Take a report of the destination about a workload that the source does not have. A workload that is being
        received is reported as busy."""
        if found is not None and found.status in ("running", "paused"):
            self._done(task)
        elif found is None and task.state == "searching":
            reason = f"neither {task.move.source} nor {task.move.destination} reports it"
            self._stick(task, reason, remedies.of_lost(task))

    def _check(self, task: Task) -> None:
        """Continue a task whose timer has expired."""
        if task.state == "waiting":
            self._check_source(task)
        elif task.state == "moving":
            silent = task.heard + self.limits.host_timeout
            if self._now < silent:
                self._set_timer(task, silent)
            else:
                task.reason = task.reason or f"{task.move.source} has not reported about the move"
                self._doubt(task)
        elif self._now >= task.doubted + self.limits.host_timeout:
            reason = f"the outcome of its move to {task.move.destination} is unknown: {task.reason}"
            self._stick(task, reason, remedies.of_unknown(task, self._unreachable(task)))
        elif self._now >= task.heard + QUESTION_INTERVAL:
            searching = task.state == "searching"
            task.state = "searching" if searching else "asking"
            self._ask(task, task.move.destination if searching else task.move.source)
        else:
            self._set_timer(task, task.heard + QUESTION_INTERVAL)

    def _check_source(self, task: Task) -> None:
        """Submit a task after its retry delay, or give it up if its source has been unreachable for too long."""
        source = task.move.source
        if source in self._lost and self._now >= self._lost[source] + self.limits.host_timeout:
            self._give_up(task, f"the agent of {source} does not reply", remedies.of_unreachable(source))
        elif self._now >= task.not_before:
            self._submit(task)
        else:
            self._set_timer(task, task.not_before)

    def _unreachable(self, task: Task) -> list[str]:
        return [host for host in (task.move.source, task.move.destination) if host in self._lost]

    # -- ends

    def _done(self, task: Task) -> None:
        """The destination owns the workload."""
        self._capacity.remove(task.workload, task.move.source)
        self._release(task)
        task.owner, task.state, task.remedy = task.move.destination, "done", ""
        self._open.discard(task.name)
        self._absent.discard(task.name)
        self._wake(task.move.source)
        self._wake(task.move.destination)

    def _aborted(self, task: Task, cause: Cause, reason: str) -> None:
        """The source owns the workload. Start it again, or give it up."""
        self._capacity.remove(task.workload, task.move.destination)
        self._release(task)
        self._wake(task.move.destination)
        self._absent.discard(task.name)
        self._open.add(task.name)  # it may have been stuck
        task.owner, task.reason, task.state = task.move.source, reason, "waiting"
        if self.cancelled:
            self._give_up(task, "the plan was cancelled", remedies.of_failure(task, "cancelled"))
        elif cause in FINAL or task.starts >= self.limits.attempts:
            self._give_up(task, reason or cause, remedies.of_failure(task, cause))
        else:
            self._retry(task, cause)

    def _retry(self, task: Task, cause: Cause) -> None:
        if cause == "not-converging":
            if not self._choose_mode(task):
                self._give_up(task, task.reason or cause, remedies.of_failure(task, cause))
                return
        else:
            task.refused.add(task.move.destination)
            if cause == "full":
                self._actions.append(AskHost(host=task.move.destination))
            self._choose_again(task)
        task.not_before = self._now + RETRY_DELAY * 2 ** (task.starts - 1)
        self._set_timer(task, task.not_before)

    def _choose_mode(self, task: Task) -> bool:
        """Choose another mode after a move that did not converge, or throttle the workload. Return False if neither is
        possible."""
        move = task.move
        other = next((one for one in OTHER_MODES[move.mode] if one not in task.workload.cannot), None)
        if other is not None:
            task.move = replace(move, mode=other, auto_converge=False, reason=f"{other}: {move.mode} did not converge")
        elif move.mode == "precopy" and not move.auto_converge:
            task.move = replace(move, auto_converge=True, reason="throttled: pre-copy did not converge")
        else:
            return False
        return True

    def _choose_again(self, task: Task) -> None:
        """Choose another destination; if no other host is suitable, keep the destination."""
        destination = self._substitutes.choose(task.workload, task.refused | self._lost.keys())
        if destination is not None:
            shares = self._capacity.rooms[destination].shares(task.workload)
            reason = f"replaces {task.move.destination}"
            task.move = replace(task.move, destination=destination, shares_base=shares, reason=reason)

    def _redirect(self, task: Task) -> None:
        """Choose another destination for a move that has not started."""
        task.refused.add(task.move.destination)
        submitted = task.request is not None
        self._withdraw(task)
        self._choose_again(task)
        if submitted:
            self._submit(task)

    def _give_up(self, task: Task, reason: str, remedy: str) -> None:
        """Leave the workload at the source."""
        self._withdraw(task)
        task.state, task.reason, task.remedy = "given-up", reason, remedy
        self._open.discard(task.name)
        self._actions.append(GiveUp(workload=task.name, reason=reason, remedy=remedy))

    def _stick(self, task: Task, reason: str, remedy: str) -> None:
        """Wait until an operator acts. The workload keeps counting on both hosts; the links are released."""
        task.state, task.reason, task.remedy = "stuck", reason, remedy
        self._open.discard(task.name)
        self._release_links(task)
        self._actions.append(GiveUp(workload=task.name, reason=reason, remedy=remedy))

    def _reopen(self, task: Task, state: State) -> None:
        """Continue to resolve a task, which may be stuck, because its source replies."""
        if task.state == "stuck":
            task.doubted = self._now
            self._open.add(task.name)
        task.heard, task.state = self._now, state
        self._set_timer(task, self._now + QUESTION_INTERVAL)

    # -- starting moves

    def _submit(self, task: Task) -> None:
        if task.state != "waiting" or task.request is not None:
            return
        task.request = self._request(task)
        self._admission.submit(task.request, task.priority)
        if task.move.source in self._lost:
            self._set_timer(task, self._lost[task.move.source] + self.limits.host_timeout)

    def _request(self, task: Task) -> Request:
        move, workload = task.move, task.workload
        volume = costs.occupied(workload, move.shares_base, self._capacity.sizes)
        return Request(
            move=move,
            load=Load(volume, workload.dirty_rate, move.mode, move.auto_converge),
            least=costs.least_rate(workload, move.mode),
            path=self._network.path(move.source, move.destination),
        )

    def _missing(self, move: Move) -> Resource | None:
        """Return what a move lacks besides rates: a reachable host, or memory at the destination."""
        for host in (move.source, move.destination):
            if host in self._lost:
                return ("state", host)
        workload = self.tasks[move.workload].workload
        return ("state", move.destination) if self._capacity.refusal(workload, move.destination) else None

    def _wake(self, host: str) -> None:
        self._admission.wake(("state", host))

    def _act(self) -> list[Action]:
        """Start the moves that can start, give up those that can never start, and return all actions."""
        for grant in self._admission.starts():
            self._start(grant)
        while self._open and not self._busy():
            self._end_stall()
        actions, self._actions = list(dict.fromkeys(self._actions)), []
        return actions

    def _start(self, grant: Grant) -> None:
        task = self.tasks[grant.request.move.workload]
        self._attempt += 1
        room = self._capacity.rooms[task.move.destination]
        shares = room.shares(task.workload)
        task.staged = costs.staging(task.workload, shares)
        room.used += task.staged
        self._capacity.add(task.workload, task.move.destination)
        task.request, task.grant, task.state, task.attempt = None, grant, "moving", self._attempt
        task.starts += 1
        task.heard, task.migration, task.cause = self._now, None, "connection-lost"
        task.move = replace(
            task.move,
            bytes=grant.bytes,
            seconds=grant.seconds,
            downtime=grant.downtime,
            rate=round(grant.rate),
            start=self._now,
            shares_base=shares,
        )
        self._actions.append(StartMove(move=task.move, attempt=task.attempt))
        self._set_timer(task, self._now + self.limits.host_timeout)

    def _busy(self) -> bool:
        """Return whether an event is to be expected: a move runs, an outcome is resolved, or a timer is set."""
        return self.wake_at is not None

    def _end_stall(self) -> None:
        """Redirect or give up the waiting moves, none of which can start although nothing runs."""
        for task in [self.tasks[name] for name in sorted(self._open)]:
            found = self._capacity.refusal(task.workload, task.move.destination)
            before = task.move.destination
            self._redirect(task)
            if task.move.destination == before:
                reason = f"no host can take it; {before}: {found or 'its agent does not reply'}"
                self._give_up(task, reason, remedies.of_failure(task, "full"))
        for grant in self._admission.starts():
            self._start(grant)

    def _withdraw(self, task: Task) -> None:
        if task.request is not None:
            self._admission.withdraw(task.request)
            task.request = None

    def _release(self, task: Task) -> None:
        """Release links and additional memory of a move that has ended."""
        self._release_links(task)
        self._capacity.rooms[task.move.destination].used -= task.staged
        task.staged = 0

    def _release_links(self, task: Task) -> None:
        if task.grant is not None:
            self._admission.release(task.grant)
            task.grant = None

    def _set_timer(self, task: Task, time: float) -> None:
        self._timer_number += 1
        heapq.heappush(self._timers, (time, self._timer_number, task.name))

    def _update_others(self, event: Reported) -> None:
        """Count the workloads of a host that do not belong to the plan as the host reports them."""
        name = event.host.name
        for workload in self._others.get(name, {}).values():
            self._capacity.remove(workload, name)
        present = {one.name: one for one in event.workloads if one.name not in self.tasks}
        for workload in present.values():
            self._capacity.add(workload, name)
        self._others[name] = present
