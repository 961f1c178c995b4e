"""Take-over at the destination: records the decision and resumes the workload after Commit, and reports to the
source."""

from __future__ import annotations

import asyncio
import contextlib
from enum import StrEnum
from logging import getLogger

from pageferry.errors import Cancelled, MigrationError, PageferryError, WorkloadDied, WorkloadError
from pageferry.host.fault_points import fault_point
from pageferry.host.state_machine import StateMachine
from pageferry.migration.engine_call import off_loop
from pageferry.migration.incoming import Incoming
from pageferry.migration.loading import populate_cold
from pageferry.migration.ownership import CommitDecision, CommitDecisions
from pageferry.migration.recovery_server import RecoveryServer
from pageferry.migration.transfer import Transfer
from pageferry.migration.transport import messages
from pageferry.workloads.protocols import Faults, announce

log = getLogger(__name__)

WATCH_FAULTS = 1.0
"""Seconds after the resume during which page faults of the workload are counted."""

ANNOUNCE_AGAIN = 1.0
"""Interval of attempts to announce a workload that does not respond, seconds."""
ANNOUNCE_TIMEOUT = 10.0
"""Maximum time until the workload is announced, from the time when its pages are present, seconds."""


class DestinationState(StrEnum):
    """State of a migration at the destination."""

    LISTENING = "listening"
    """No source has been accepted."""
    RECEIVING = "receiving"
    PREPARED = "prepared"
    """Ready was sent: the source may commit at any time, and may send Recover later."""
    RUNNING = "running"
    """The workload runs on this host, or is paused because its user had paused it."""
    GIVEN_UP = "given up"
    """The source owns the workload, and will not send Recover."""
    RENOUNCED = "renounced"
    """The source owns the workload, and may send Recover. If the decision cannot be written, the state stays
    PREPARED."""


_FOLLOWS = {
    DestinationState.LISTENING: {DestinationState.RECEIVING},
    DestinationState.RECEIVING: {DestinationState.PREPARED, DestinationState.GIVEN_UP},
    DestinationState.PREPARED: {DestinationState.RUNNING, DestinationState.RENOUNCED},
}


def destination_states() -> StateMachine[DestinationState]:
    """Return the state machine of a destination."""
    return StateMachine("the reception of a workload", DestinationState.LISTENING, _FOLLOWS)


class TakeOver:
    """Take-over of a workload that its source has committed."""

    def __init__(
        self, incoming: Incoming, transfer: Transfer, decisions: CommitDecisions, recovery: RecoveryServer
    ) -> None:
        self._incoming = incoming
        self._transfer = transfer
        self._decisions = decisions
        self._recovery = recovery
        self._faults = Faults(0, 0)
        """Page faults of the workload before it was resumed."""
        self.stays_paused = False
        """Whether the workload is left paused, because its user had paused it."""
        self._announcing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Record the decision COMMITTED, resume the workload, and send Running. Raises Cancelled if ABORTED was decided
        in reply to Recover, WorkloadError if the workload cannot be resumed."""
        fault_point("destination.commit-received")
        incoming, migration = self._incoming, self._incoming.hello.migration
        # This comes before the decision, because from then on the workload must survive the exit of this process.
        await incoming.workload.commit(self._decisions.witness(migration))
        self._faults = incoming.workload.faults()
        self.stays_paused = incoming.workload.stays_paused
        if self._decisions.decide(migration, CommitDecision.COMMITTED) is not CommitDecision.COMMITTED:
            raise Cancelled("the migration was aborted in reply to a recovery request from the source")
        # Resuming may access a missing page after the link is lost, so a reconnecting source is served from here on.
        self._recovery.arrivals = self._transfer.postcopy
        fault_point("destination.decided")
        with incoming.times.measure("resume"):
            await self._resume()
        incoming.times.stop_all()
        fault_point("destination.resumed")
        with contextlib.suppress(MigrationError):
            await incoming.send(messages.Running(resume=incoming.times.seconds("resume")))
        self._announcing = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        """Announce the network addresses of the workload. In post-copy, QEMU may itself wait for a missing page, and
        respond only after a recovery, so retry until it responds."""
        while True:
            if await announce(self._incoming.workload):
                return
            await asyncio.sleep(ANNOUNCE_AGAIN)

    async def _end_announcement(self) -> None:
        """Wait until the workload is announced, or does not respond although its pages are present."""
        if self._announcing is None:
            return
        try:
            await asyncio.wait({self._announcing}, timeout=ANNOUNCE_TIMEOUT)
        finally:
            self._announcing.cancel()

    async def _resume(self) -> None:
        """Resume the workload. If this fails and the workload certainly has not run, withdraw the decision: the source
        still has its memory and state. Raises WorkloadError."""
        try:
            await self._incoming.workload.resume()
        except WorkloadError as failed:
            if failed.never_ran:
                self._recovery.arrivals = None
                self._decisions.withdraw(self._incoming.hello.migration)
            raise

    async def report(self) -> bool:
        """Send the statistics. Return whether the source knows that this host owns the workload.

        In post-copy, fetch the missing pages first, over any number of links. Raises WorkloadDied.
        """
        incoming = self._incoming
        try:
            if (postcopy := self._transfer.postcopy) is not None:
                incoming.channel = await postcopy.wait_complete()
                await incoming.send(postcopy.arrived())
            else:
                await populate_cold(self._transfer)
                await asyncio.sleep(WATCH_FAULTS)
            await incoming.send(await self._report())
            await incoming.receive_one(messages.Done)
        except (WorkloadDied, asyncio.CancelledError):
            if self._announcing is not None:
                self._announcing.cancel()
            raise
        except PageferryError as error:
            log.warning("this host owns the workload; the source may not know this: %s", error)
            return False
        finally:
            try:
                await incoming.channel.close()
            finally:
                await self._end_announcement()
        return True

    async def _report(self) -> messages.Report:
        placement, faults = self._transfer.placement, self._faults_by_now()
        large = await off_loop(placement.memory.large_units)
        return messages.Report(
            # The difference is negative if a thread has exited since the first count: its faults are no longer counted.
            minor_faults=max(faults.minor - self._faults.minor, 0),
            major_faults=max(faults.major - self._faults.major, 0),
            large_pages=sum(map(sum, large)),
            fallbacks=placement.placer.fallbacks,
            populated=placement.populated(),
            units=[messages.pack_units(units) for units in large],
        )

    def _faults_by_now(self) -> Faults:
        try:
            return self._incoming.workload.faults()
        except WorkloadDied:
            if self._transfer.postcopy is None:
                raise
            return self._faults  # all pages were received: the workload may have been migrated further, or exited
