"""Hosts of a fleet for tests of the execution of plans: what really happens, as opposed to what the execution knows.

Each move follows the ownership protocol (docs/protocol.md): copying, handed over, decided. The world runs the actions
of the execution, loses and repeats messages, and kills agents, moves and workloads. It fails a test when the execution
starts a move that could lead to two owners, or that overfills a host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from msgspec.structs import replace

from pageferry.fleet import costs, steps
from pageferry.fleet.capacity import Capacity
from pageferry.fleet.execution import Execution
from pageferry.fleet.model import Host, Move, Operation, Plan, View, Workload
from pageferry.fleet.tasks import Task


@dataclass(slots=True)
class Live:
    """Move that has started at its source, and whose records exist."""

    move: Move
    attempt: int
    phase: str = "copying"
    """`copying`: the source runs the workload; `handed`: neither side does; `decided`: the destination does."""
    conducted: bool = True
    """Whether the process at the source that conducts the move is alive."""
    heard: bool = True
    """Whether the end is reported to the driver."""


class World:
    """Hosts, workloads and messages, with an execution."""

    def __init__(self, view: View, plan: Plan, execution: Execution | None = None) -> None:
        self.view = view
        self.now = 0.0
        self.execution = execution or Execution(view, plan)
        self.workloads = {one.name: one for one in view.workloads}
        self.owner: dict[str, str | None] = {one.name: one.host for one in view.workloads}
        self.dead: set[str] = set()
        self.lives: dict[str, Live] = {}
        self.hosts: dict[str, Host] = {one.name: one for one in view.hosts}
        self.down: set[str] = set()
        """Hosts whose agent does not run, or which cannot be reached."""
        self.full: set[str] = set()
        """Hosts that reject moves, because other programs use their memory."""
        self.fences: dict[str, int] = {}
        self.orders: list[steps.Action] = []
        """Actions on the way to agents."""
        self.news: list[steps.StepEvent] = []
        """Events on the way to the execution."""
        self.instructions: dict[str, steps.GiveUp] = {}
        self.take(self.execution.start(self.now))

    # -- between execution and agents

    def take(self, actions: Iterable[steps.Action]) -> None:
        """Take the actions of the execution, and check that they are safe."""
        for action in actions:
            if isinstance(action, steps.GiveUp):
                assert action.reason
                assert action.remedy
                self.instructions[action.workload] = action
                continue
            if isinstance(action, steps.StartMove):
                self._check_start(action)
            self.orders.append(action)
        self.check()

    def _check_start(self, action: steps.StartMove) -> None:
        name, move = action.move.workload, action.move
        delayed = [
            order
            for order in self.orders
            if isinstance(order, steps.StartMove)
            and order.move.workload == name
            and order.attempt > self.fences.get(name, 0)
        ]
        assert name not in self.lives, f"{name} is moved while its last move is unresolved"
        assert not delayed, f"an earlier start of {name} may still happen"
        assert name in self.dead or self.owner[name] == move.source, f"{name} is on {self.owner[name]}: {move}"

    def tell(self, event: steps.StepEvent) -> None:
        """Pass an event to the execution."""
        self.take(self.execution.handle(event, self.now))

    def deliver(self, number: int) -> None:
        """Deliver one of the events on the way."""
        self.tell(self.news.pop(number % len(self.news)))

    def perform(self, number: int) -> None:
        """Perform one of the actions on the way."""
        order = self.orders.pop(number % len(self.orders))
        if isinstance(order, steps.StartMove):
            self._start(order)
        elif isinstance(order, steps.CancelMove):
            self._cancel(order)
        elif isinstance(order, steps.AskHost):
            self._report(order.host)
        elif isinstance(order, steps.Recover):
            self._recover(order)

    def _start(self, order: steps.StartMove) -> None:
        move = order.move
        name = move.workload
        if move.source in self.down:
            self.news.append(steps.HostLost(host=move.source))
            self.news.append(steps.Ended(workload=name, attempt=order.attempt, outcome="unknown", reason="no agent"))
        elif order.attempt <= self.fences.get(name, 0):
            self._aborted(name, order.attempt, "refused", "out of date")
        elif name in self.dead:
            self._aborted(name, order.attempt, "workload-died", "it has exited")
        elif move.destination in self.down:
            self._aborted(name, order.attempt, "connection-lost", "no route")
        elif move.destination in self.full:
            self._aborted(name, order.attempt, "full", "no memory")
        else:
            self.lives[name] = Live(move, order.attempt)
            self.news.append(steps.Begun(workload=name, attempt=order.attempt, migration=f"{name}-{order.attempt}"))

    def _aborted(self, name: str, attempt: int, cause: steps.Cause, reason: str) -> None:
        self.news.append(steps.Ended(workload=name, attempt=attempt, outcome="aborted", cause=cause, reason=reason))

    def _cancel(self, order: steps.CancelMove) -> None:
        live = self.lives.get(order.workload)
        if order.source not in self.down and live is not None and live.attempt == order.attempt:
            self.fail(order.workload, "cancelled")

    def _report(self, host: str) -> None:
        if host in self.down:
            self.news.append(steps.HostLost(host=host))
        else:
            self.news.append(self.report(host))

    def report(self, host: str) -> steps.Reported:
        """Return the state of a host."""
        found, running = [], []
        for name, workload in self.workloads.items():
            live = self.lives.get(name)
            source = live is not None and live.move.source == host
            if name in self.dead or not (source or self.owner[name] == host or self._receives(live, host)):
                continue
            status = "running"
            if live is not None and (live.conducted or not source):
                status = "busy"
            elif live is not None:
                status = "unknown"
            found.append(replace(workload, host=host, status=status))
            if live is not None and live.conducted and source:
                running.append(Operation(verb="move", workload=name, host=host, destination=live.move.destination))
        return steps.Reported(host=self.hosts[host], workloads=tuple(found), operations=tuple(running))

    def _receives(self, live: Live | None, host: str) -> bool:
        return live is not None and live.conducted and live.move.destination == host

    def _recover(self, order: steps.Recover) -> None:
        name = order.workload
        if order.source in self.down:
            self.news.append(steps.HostLost(host=order.source))
            return
        self.fences[name] = max(order.attempt, self.fences.get(name, 0))
        live = self.lives.get(name)
        owner: steps.Owner = "unknown"
        if name in self.dead:
            owner = "absent"
            self.lives.pop(name, None)
        elif live is None:
            owner = "source" if self.owner[name] == order.source else "absent"
        elif not live.conducted and live.move.destination not in self.down:
            owner = "destination" if live.phase == "decided" else "source"
            self.owner[name] = live.move.destination if live.phase == "decided" else live.move.source
            del self.lives[name]
        self.news.append(steps.Recovered(workload=name, attempt=order.attempt, owner=owner, reason="recovery"))

    # -- what happens

    def advance(self, name: str) -> None:
        """Continue a move by one phase."""
        live = self.lives[name]
        if not live.conducted:
            return
        if live.phase == "copying":
            live.phase, self.owner[name] = "handed", None
        elif live.phase == "handed":
            live.phase, self.owner[name] = "decided", live.move.destination
        else:
            del self.lives[name]
            if live.heard:
                self.news.append(steps.Ended(workload=name, attempt=live.attempt, outcome="done"))
        self.check()

    def fail(self, name: str, cause: steps.Cause) -> None:
        """End a move by a failure of the link or of a peer: before the hand-over it is aborted, later it is unknown."""
        live = self.lives[name]
        if not live.conducted:
            return
        if live.phase == "copying":
            del self.lives[name]
            if live.heard:
                self._aborted(name, live.attempt, cause, cause)
            return
        live.conducted = False
        if live.heard:
            self.news.append(steps.Ended(workload=name, attempt=live.attempt, outcome="unknown", reason=cause))

    def kill_agent(self, host: str, *, orphans: bool) -> None:
        """Kill the agent of a host. `orphans`: the moves that it has started continue without it."""
        self.down.add(host)
        for name, live in list(self.lives.items()):
            if live.move.source == host:
                live.heard = False
                if not orphans:
                    self.fail(name, "other")

    def lose_host(self, host: str) -> None:
        """Cut a host off. Its workloads keep running."""
        self.down.add(host)
        for name, live in list(self.lives.items()):
            if host in (live.move.source, live.move.destination):
                live.heard = live.heard and live.move.source != host
                self.fail(name, "connection-lost")

    def start_agent(self, host: str) -> None:
        """Start the agent of a host again."""
        self.down.discard(host)
        self.news.append(self.report(host))

    def restart_head(self) -> None:
        """Lose all calls of the driver. Orders on the way to agents may arrive later."""
        self.news.clear()
        for live in self.lives.values():
            live.heard = False
        self.tell(steps.HeadRestarted())

    def end_workload(self, name: str) -> None:
        """Kill the process of a workload, on both sides of its move."""
        self.dead.add(name)
        live = self.lives.pop(name, None)
        if live is not None and live.conducted and live.heard:
            self._aborted(name, live.attempt, "workload-died", "it has exited")

    def tick(self, seconds: float) -> None:
        """Let time pass, and pass the ticks that are due."""
        until = self.now + seconds
        while (wake := self.execution.wake_at) is not None and wake <= until:
            self.now = max(self.now, wake)
            self.tell(steps.Ticked())
        self.now = until

    # -- what must always hold

    def check(self) -> None:
        """Check that the execution knows nothing wrong, and that no host is overfilled."""
        for task in self.execution.tasks.values():
            self._check_task(task)
        for host in self.hosts:
            self._check_host(host)

    def _check_task(self, task: Task) -> None:
        if task.owner is not None and task.name not in self.dead and task.state != "moving":
            assert self.owner[task.name] == task.owner, (task.state, task.name, self.lives.get(task.name))
            assert task.name not in self.lives or task.state == "done"

    def _check_host(self, host: str) -> None:
        """Add up the memory that is really in use: both sides of each move, and each base once."""
        capacity: Capacity = self.execution._capacity
        used, bases, groups = 0, set(), []
        for name, workload in self.workloads.items():
            live = self.lives.get(name)
            incoming = live is not None and live.move.destination == host
            if name in self.dead or not (self.owner[name] == host or incoming or self._leaves(live, host)):
                continue
            shares = workload.base is not None and (workload.host == host or workload.base in self.hosts[host].images)
            used += costs.occupied(workload, shares, capacity.sizes)
            used += costs.staging(workload, shares) if incoming else 0
            bases |= {workload.base} if shares else set()
            groups += [workload.group] if workload.group else []
        used += sum(capacity.sizes[str(base)] for base in bases)
        assert used <= self.hosts[host].memory - self.hosts[host].headroom, f"{host} is overfilled"
        assert len(groups) == len(set(groups)), f"{host} runs two workloads of a group"

    def _leaves(self, live: Live | None, host: str) -> bool:
        return live is not None and live.move.source == host

    def settle(self) -> None:
        """Repair everything, let all messages arrive, and run until the execution has finished."""
        self.full.clear()
        self.down.clear()
        for host in self.hosts:
            self.start_agent(host)
        for _ in range(20_000):
            if self.news:
                self.deliver(0)
            elif self.orders:
                self.perform(0)
            elif self.lives and (moving := [name for name, live in self.lives.items() if live.conducted]):
                self.advance(moving[0])
            elif self.execution.finished:
                break
            else:
                wake = self.execution.wake_at
                assert wake is not None, "the execution waits for nothing"
                self.tick(max(wake - self.now, 0.0))
        assert self.execution.finished
        self._check_end()

    def _check_end(self) -> None:
        for task in self.execution.tasks.values():
            if task.name in self.dead:
                continue
            assert task.state in ("done", "given-up"), (task.state, task.reason)
            assert task.owner == self.owner[task.name]
            if task.state == "done":
                assert task.owner == task.move.destination
            else:
                assert task.name in self.instructions


def small_view(hosts: int = 5, workloads: int = 8, memory: int = 64) -> View:
    """Return a fleet with workloads on the first host: clones, others, and two of a group. `memory`: that of the other
    hosts, MiB."""
    unit = 1 << 20
    image = "0" * 32 + ":" + "1" * 16
    every = tuple(
        Host(
            name=f"h{number}",
            memory=(memory if number else 64) * unit,
            headroom=2 * unit,
            link=unit,
            images=frozenset({image}) if number % 2 == 0 else frozenset(),
        )
        for number in range(hosts)
    )
    placed = tuple(
        Workload(
            name=f"w{number}",
            host="h0",
            memory=(4 if number % 2 else 2 + number) * unit,
            private=(1 if number % 2 else 2 + number) * unit,
            base=image if number % 2 else None,
            dirty_rate=unit // 8,
            group=f"g{number}" if number in (2, 3) else None,
        )
        for number in range(workloads)
    )
    others = (
        Workload(name="g2-other", host="h1", memory=unit, private=unit, group="g2"),
        Workload(name="g3-other", host="h2", memory=unit, private=unit, group="g3"),
    )
    return View(hosts=every, workloads=placed + others)
