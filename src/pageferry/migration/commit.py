"""Commit at the source: hands over the ownership of a paused workload to a destination that is ready."""

from __future__ import annotations

import asyncio
import contextlib
import time

from pageferry.errors import MigrationError, OutcomeUnknown, PeerRefused
from pageferry.host.fault_points import fault_point
from pageferry.host.state_machine import StateMachine
from pageferry.migration import ownership
from pageferry.migration.engine_call import GRACE
from pageferry.migration.ownership import RECORD, Committed
from pageferry.migration.session import Session
from pageferry.migration.source_state import SourceState
from pageferry.migration.transport import messages


class Commit:
    """Transfer of ownership. Once the commit is recorded, the source never runs the workload on its own."""

    def __init__(self, session: Session, state: StateMachine[SourceState]) -> None:
        self._session = session
        self._state = state

    async def run(self) -> messages.Running:
        """Commit, and return the destination's reply. After a cancellation, wait for the reply for at most GRACE
        seconds; without a reply, the outcome is unknown.

        Raises OutcomeUnknown, or PeerRefused if the destination has decided not to run the workload.
        """
        task = asyncio.ensure_future(self._commit())
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait((task,), timeout=GRACE)
                if self._state.is_in(SourceState.COMMITTED):
                    task.cancel()
        return task.result()

    async def _commit(self) -> messages.Running:
        job, statistics = self._session.job, self._session.statistics
        statistics.times.phase("hand-over")
        statistics.stays_paused = job.workload.stays_paused
        self._record()
        fault_point("source.recorded")
        await job.workload.commit()
        fault_point("source.committed")
        self._state.enter(SourceState.COMMITTED)
        try:
            running = await self._handed_over()
        except PeerRefused:
            # The destination decides before it refuses: the source owns the workload.
            self._state.enter(SourceState.REFUSED)
            raise
        except (MigrationError, asyncio.CancelledError) as error:
            raise self._outcome_unknown(error) from error
        fault_point("source.answered")
        received = time.perf_counter()
        statistics.times.stop("downtime", at=received)
        statistics.times.phase("postcopy" if self._session.service is not None else "report", at=received)
        self._state.enter(SourceState.MOVED)
        return running

    async def _handed_over(self) -> messages.Running:
        channel = self._session.channel
        await channel.send(messages.Commit())
        fault_point("source.commit-sent")
        return await channel.receive(messages.Running)

    def _record(self) -> None:
        job, options = self._session.job, self._session.job.options
        if job.folder is not None:
            record = Committed(
                version=ownership.VERSION,
                changes=job.workload.changes,
                migration=job.migration,
                peer=self._session.statistics.peer,
                hostname=self._session.link.hostname,
                keeps_pages=self._session.service is not None,
                streams=options.streams,
                codec=options.codec,
                bandwidth=options.bandwidth,
                adaptive=options.adaptive,
            )
            job.folder.store(RECORD, record)

    def _outcome_unknown(self, error: BaseException) -> OutcomeUnknown:
        job, peer = self._session.job, self._session.statistics.peer
        ask = f"pageferry migrate {job.workload.name} --recover" if job.folder else "pageferry.recover"
        return OutcomeUnknown(
            f"{job.workload.name}: no reply from {peer} to the commit ({reason_of(error)}). The workload "
            f"stays paused on this host; to learn the outcome, run: {ask}",
            job.migration,
            peer,
            self._session.link.hostname,
        )


def reason_of(error: BaseException) -> str:
    """Return the reason for the failure of a migration, as sent in Abort."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled at the source"
    return str(error) or type(error).__name__
