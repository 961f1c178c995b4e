"""Driver of a plan: performs the actions of the state machine (`execution`) by calls to the agents of hosts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pageferry.events import Listener
from pageferry.fleet.cluster import Cluster
from pageferry.fleet.events import FleetMoveEvent, MoveResult
from pageferry.fleet.model import Move, Plan, Unplaced, View
from pageferry.fleet.mover import Attempt
from pageferry.fleet.steps import Begun, Ended, Progressed, Recovered, StepEvent


@dataclass(slots=True)
class Driver:
    cluster: Cluster
    view: View
    plan: Plan
    listener: Listener
    begun: float = field(default_factory=time.monotonic)

    async def run(self) -> tuple[list[MoveResult], list[Unplaced]]:
        results = [await self._one(move) for move in self.plan.moves]
        return results, []

    async def _one(self, move: Move) -> MoveResult:
        attempt = Attempt(self.cluster, move, 1, lambda event: self._heard(move, event))
        started = time.monotonic() - self.begun
        ended = await attempt.run()
        self._heard(move, ended)
        outcome = ended.outcome
        if outcome == "unknown":
            owner = await attempt.recover()
            self._heard(move, owner)
            outcome = {"source": "aborted", "destination": "done"}.get(owner.owner, "unknown")
        return MoveResult(
            workload=move.workload,
            source=move.source,
            destination=move.destination,
            outcome=outcome,
            attempts=1,
            started=started,
            ended=time.monotonic() - self.begun,
            reason=ended.reason,
        )

    def _heard(self, move: Move, event: StepEvent) -> None:
        phase = {
            Begun: "moving",
            Progressed: "progress",
            Ended: getattr(event, "outcome", None),
            Recovered: "recovering",
        }[type(event)]
        self.listener(
            FleetMoveEvent(
                at=time.monotonic() - self.begun,
                workload=move.workload,
                source=move.source,
                destination=move.destination,
                attempt=event.attempt,
                phase=phase,
                fraction=getattr(event, "fraction", None),
                reason=getattr(event, "reason", ""),
            )
        )
