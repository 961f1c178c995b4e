"""One move of a fleet: a receiver at the destination, a migration at the source, and a recovery if its end is unknown.

The driver only starts processes on the two hosts and observes them (`protocol`). It decides nothing about ownership: a
move without a known end is resolved by `pageferry migrate --recover` at the source, to which the destination replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pageferry.errors import (
    AuthenticationError,
    Cancelled,
    ConnectionLost,
    FleetError,
    ImageError,
    NoSuchWorkload,
    NotConverging,
    OutcomeUnknown,
    PageferryError,
    PeerRefused,
    PostcopyPaused,
    ProtocolError,
    RestoreError,
    UnsupportedError,
    UsageError,
    WorkloadDied,
)
from pageferry.fleet.agent import STARTING
from pageferry.fleet.cluster import CALL, AgentUnreachable, Cluster
from pageferry.fleet.model import Move
from pageferry.fleet.protocol import (
    Answer,
    Cancel,
    Done,
    Migrate,
    Moved,
    OperationReport,
    Prepare,
    Query,
    Receive,
    RecoveryReport,
)
from pageferry.fleet.protocol import Recover as RecoverRequest
from pageferry.fleet.steps import Begun, Cause, Ended, HostLost, Owner, Progressed, Recovered, StepEvent

_WAIT = 1.0
"""Seconds that an agent waits for the end of an operation in one request."""
ANSWERING = 60.0
"""Seconds for which a destination replies to recovery requests in the place of a receiver that has exited."""
_CAUSES: dict[int, Cause] = {
    UnsupportedError.exit_code: "unsupported",
    UsageError.exit_code: "unsupported",
    WorkloadDied.exit_code: "workload-died",
    NoSuchWorkload.exit_code: "workload-died",
    PeerRefused.exit_code: "refused",
    ConnectionLost.exit_code: "connection-lost",
    NotConverging.exit_code: "not-converging",
    ProtocolError.exit_code: "other",
    AuthenticationError.exit_code: "other",
    ImageError.exit_code: "other",
    RestoreError.exit_code: "other",
}
"""Exit codes that prove that a migration has ended before its commit (docs/faults.md). After all others, the source is
asked."""
_CANCELLED = (Cancelled.exit_code, 130, 143)
"""Exit codes after a cancellation. In post-copy, it may have come after the commit."""
_FULL = "raise `max_size`, or free memory"
"""End of the refusal of a receiver that has too little memory."""

Emit = Callable[[StepEvent], object]


@dataclass(slots=True)
class Attempt:
    """One attempt to move a workload."""

    cluster: Cluster
    move: Move
    number: int
    emit: Emit
    """Function that receives the events of the attempt."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    address: str | None = None
    """Address of the receiver."""
    report: OperationReport | None = None
    """Last report of the migration."""

    @property
    def _receiving(self) -> str:
        return f"{self.id}-in"

    @property
    def _migrating(self) -> str:
        return f"{self.id}-out"

    async def run(self) -> Ended:
        """Move the workload. Return how the attempt has ended; never raises a PageferryError."""
        try:
            moved = await self.cluster.call(self.move.source, Prepare(workload=self.move.workload), Moved)
        except PageferryError as error:
            return self._aborted(error)
        try:
            await self._start_receiver(moved)
        except PageferryError as error:  # the receiver may run, and would keep the name at the destination
            await self._end_receiver()
            return self._aborted(error)
        try:
            await self._start_migration()
        except FleetError:
            pass  # the migration may have been started; an agent that is started again reports it
        except PageferryError as error:
            await self._end_receiver()
            return self._aborted(error)
        return await self._follow()

    async def recover(self) -> Recovered:
        """Determine the owner of the workload. Never raises a PageferryError."""
        try:
            owner, reason = await self._owner()
        except PageferryError as error:
            owner, reason = "unknown", str(error)
        if owner == "source":
            await self._end_receiver()
        return Recovered(workload=self.move.workload, attempt=self.number, owner=owner, reason=reason)

    async def cancel(self) -> None:
        """Cancel the migration, unless it is committed."""
        with contextlib.suppress(PageferryError):  # `run` observes what happens to it
            await self.cluster.call(
                self.move.source, Cancel(id=self._migrating), OperationReport, timeout=STARTING + CALL
            )

    async def _start_receiver(self, moved: Moved) -> None:
        request = Receive(id=self._receiving, moved=moved, source=self.move.source)
        listening = await self.cluster.call(self.move.destination, request, OperationReport, timeout=STARTING + CALL)
        self.address = listening.address

    async def _start_migration(self) -> None:
        assert self.address is not None
        move = self.move
        request = Migrate(
            id=self._migrating,
            workload=move.workload,
            destination=move.destination,
            address=self.address,
            mode=move.mode,
            bandwidth=move.rate,
            auto_converge=move.auto_converge,
        )
        self.report = await self.cluster.call(move.source, request, OperationReport)
        self.emit(Begun(workload=move.workload, attempt=self.number))

    @property
    def result(self) -> dict[str, Any] | None:
        """Result of a completed migration, as `pageferry migrate` reports it; None if the source did not report it."""
        found = None if self.report is None else self.report.result
        return found if found is not None and found.get("type") == "migration" else None

    async def _follow(self) -> Ended:
        """Observe the migration until it has ended. While the agent of the source does not reply, report this."""
        query = Query(id=self._migrating, wait=_WAIT)
        while True:
            try:
                report = await self.cluster.call(self.move.source, query, OperationReport, timeout=_WAIT + CALL)
            except AgentUnreachable as error:
                self.emit(HostLost(host=self.move.source, reason=str(error)))
                await asyncio.sleep(_WAIT)
                continue
            except PageferryError as error:  # without a report, it may have been started, and committed
                return self._ended("unknown", reason=str(error))
            self.report = report
            if report.state != "running":
                return await self._result(report)
            self.emit(Progressed(workload=self.move.workload, attempt=self.number, fraction=report.fraction or 0.0))

    async def _result(self, report: OperationReport) -> Ended:
        if report.state == "lost":
            return self._ended("unknown", reason="the process of the migration was killed")
        code = report.exit_code
        if code == 0:
            return self._ended("done")
        if code not in _CAUSES:
            cause: Cause = "cancelled" if code in _CANCELLED else "connection-lost"
            return self._ended("unknown", cause=cause, reason=report.message)
        await self._end_receiver()
        cause = "full" if _FULL in report.message else _CAUSES[code]
        return self._ended("aborted", cause=cause, reason=report.message)

    async def _owner(self) -> tuple[Owner, str]:
        """Return the owner, and why it is unknown. A destination whose receiver has exited replies by its agent."""
        move, request = self.move, RecoverRequest(workload=self.move.workload)
        timeout = ANSWERING + CALL
        try:
            found = await self.cluster.call(move.source, request, RecoveryReport, timeout=timeout)
        except NoSuchWorkload as error:
            return "absent", str(error)
        except (OutcomeUnknown, PostcopyPaused) as error:
            address = self.address or await self._last_address()
            if address is None:
                return "unknown", str(error)
            try:
                resume = isinstance(error, PostcopyPaused) or move.mode != "precopy"
                answer = Answer(address=address, seconds=ANSWERING, workload=move.workload, resume=resume)
                await self.cluster.call(move.destination, answer, Done, timeout=STARTING + CALL)
                found = await self.cluster.call(move.source, request, RecoveryReport, timeout=timeout)
            except PageferryError as again:
                return "unknown", str(again)
        return found.owner, ""

    async def _last_address(self) -> str | None:
        """Return the address of the last receiver of the workload at the destination."""
        report = await self.cluster.report(self.move.destination)
        receivers = [one for one in report.operations if one.workload == self.move.workload and one.address]
        return receivers[-1].address if receivers else None

    async def _end_receiver(self) -> None:
        """End the receiver, and remove what it has left. An error is dropped: it owns nothing."""
        with contextlib.suppress(PageferryError):
            await self.cluster.call(
                self.move.destination, Cancel(id=self._receiving), OperationReport, timeout=STARTING + CALL
            )

    def _aborted(self, error: PageferryError) -> Ended:
        cause = _CAUSES.get(error.exit_code, "other") if not isinstance(error, FleetError) else "other"
        return self._ended("aborted", cause=cause, reason=str(error))

    def _ended(self, outcome: str, *, cause: Cause = "other", reason: str = "") -> Ended:
        return Ended(
            workload=self.move.workload,
            attempt=self.number,
            outcome=outcome,  # type: ignore[arg-type]
            cause=cause,
            reason=reason,
        )
