"""Switch-over at the source: pauses the workload, and sends the last pages and the device state."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from hashlib import blake2b
from typing import Any

from pageferry._engine import PageSet
from pageferry.errors import WorkloadError
from pageferry.host.fault_points import fault_point
from pageferry.memory.view import Memory
from pageferry.migration.deferred_pages import load_all
from pageferry.migration.engine_call import off_loop
from pageferry.migration.missing_pages import send_missing
from pageferry.migration.page_service import PageService
from pageferry.migration.precopy import Rest
from pageferry.migration.rounds import Round, Rounds, count, union
from pageferry.migration.session import Session
from pageferry.migration.transport import messages
from pageferry.migration.write_trace import WriteTrace
from pageferry.workloads.direct_io import registered_buffers
from pageferry.workloads.protocols import BASE, BASE_REQUIRED, COPIED, SHARED, pause_to_save

_OF_MIGRATION = (SHARED, COPIED, BASE, BASE_REQUIRED)
"""Details in Hello that describe the migration, not the workload."""

MAX_SHOWN = 1000
"""Maximum number of characters of a detail that an error message quotes."""


class SwitchOver(ABC):
    """Switch-over of a migration. Its steps are `_prepare`, `_pause`, `_finish_memory` (with the device state), and
    waiting for Ready. Subclasses define which pages are sent before the workload resumes.
    """

    def __init__(self, session: Session, rounds: Rounds, rest: Rest) -> None:
        self._session = session
        self._rounds = rounds
        self._rest = rest.pages
        self.sent: list[Round] = []
        """Rounds of the switch-over. They are reported when the pause is over, so that no listener prolongs it."""
        self._state_sent = 0
        """Number of bytes of the device state that have been sent."""

    async def run(self) -> messages.Ready:
        """Switch over, and return the Ready message. On return, the workload is paused, and the destination is ready to
        run it."""
        session, times = self._session, self._session.statistics.times
        times.phase("prepare")
        await self._prepare()
        if session.disks is not None:
            await session.disks.stop_measuring()
        if session.throttle is not None:
            session.throttle.lift()
        await self._pause()
        state = await self._finish_memory()
        self._check_identity()
        session.memory.check_files()
        await self._send_state(state[self._state_sent :])
        digest = blake2b(state, digest_size=32).digest()
        await session.channel.send(messages.StateEnd(length=len(state), digest=digest))
        fault_point("source.state-sent")
        times.phase("load")
        await session.job.workload.prepare_commit()
        ready = await session.channel.receive(messages.Ready, session.job.options.timeout)
        session.memory.check_files()
        fault_point("source.ready")
        return ready

    # -- before the pause

    async def _prepare(self) -> None:
        """Prepare the pause, and load deferred pages. In pre-copy, also send the remaining pages, so that only pages
        modified later are left for the pause."""
        workload = self._session.job.workload
        if self._sends_before_pause:
            await self._session.drain()
        checking = asyncio.create_task(workload.check_mappers())
        preparing = asyncio.create_task(workload.prepare_pause())
        try:
            await self._load_deferred()
            if self._sends_before_pause:
                await self._send(self._rest)
        finally:
            was_prepared = preparing.done()
            await asyncio.gather(preparing, checking)
        if was_prepared:  # before the pages were sent: repeat the checks now, not during the pause
            await workload.prepare_pause()

    @property
    @abstractmethod
    def _sends_before_pause(self) -> bool:
        """Whether to send the remaining pages before the pause."""

    async def _load_deferred(self) -> None:
        if (hold := self._session.deferred) is not None:
            await self._session.channel.during(load_all(hold, [region.pages for region in self._rest]))
            self._session.deferred = None

    async def _pause(self) -> None:
        """Pause the workload. The downtime begins when the workload stops; the first part of its device state may
        already have been sent."""
        session, times = self._session, self._session.statistics.times
        stopped = await pause_to_save(session.job.workload, self._send_ahead)
        times.start("downtime", at=stopped)
        times.start("stop", at=stopped)
        times.phase("stop", at=stopped)
        times.stop("stop")
        times.phase("last-pages")
        session.drains.due = False  # pausing has completed all I/O
        fault_point("source.paused")

    def _check_identity(self) -> None:
        """Raise WorkloadError if the configuration of the workload differs from the one in Hello, which the destination
        matches."""
        workload = self._session.job.workload
        sent, now = self._session.hello.details, workload.identity.details
        told = {key: value for key, value in sent.items() if key not in _OF_MIGRATION}
        if changed := [key for key in told | now if told.get(key) != now.get(key)]:
            raise WorkloadError(
                f"{workload.name} was reconfigured during its migration: "
                + "; ".join(_change(key, told.get(key), now.get(key)) for key in changed)
                + "; retry with a destination that has the same configuration"
            )

    # -- during the pause

    @abstractmethod
    async def _finish_memory(self) -> bytes:
        """Save the device state, and send the last pages or the sets of missing pages; return the state."""

    async def _pinned(self) -> list[PageSet]:
        """Return the pages in buffers that stay pinned: the trace does not report writes to them."""
        memory, statistics = self._session.memory, self._session.statistics
        pinned = await off_loop(lambda: registered_buffers(memory.regions))
        statistics.pinned = count(pinned)
        return pinned

    async def _send(self, pages: list[PageSet]) -> None:
        """Send a round, and add it to `sent`, to be reported later."""
        self._note_remaining(pages)
        sent = await self._rounds.send(pages)
        sent.switch_over = True
        self.sent.append(sent)

    def _note_remaining(self, pages: list[PageSet]) -> None:
        """Record in the last round the number of pages that it left to send."""
        if self.sent:
            self.sent[-1].remaining = count(pages)

    async def _send_ahead(self, chunk: bytes) -> None:
        """Send a chunk of the device state that the destination loads at once. The workload may still run."""
        await self._send_state(chunk, ahead=True)

    async def _save_state(self) -> bytes:
        """Save the device state, and send the unsent part of its first `EARLY_STATE` bytes. Return the whole state.

        The destination queues these bytes until it has received the last pages.
        """
        await self._finish_disks()
        state = await self._session.job.workload.save_state()
        await self._send_state(state[self._state_sent : messages.EARLY_STATE])
        return state

    async def _finish_disks(self) -> None:
        """Complete the copies of the disks, before QEMU releases the disks to save its state."""
        session = self._session
        if session.disks is not None:
            with session.statistics.times.measure("disks"):
                await session.channel.during(session.disks.finish())

    async def _send_state(self, part: bytes, *, ahead: bool = False) -> None:
        for start in range(0, len(part), messages.STATE_CHUNK):
            chunk = part[start : start + messages.STATE_CHUNK]
            await self._session.channel.send(messages.State(data=chunk, ahead=ahead))
            self._state_sent += len(chunk)


class PrecopySwitchOver(SwitchOver):
    """Switch-over after which no page is missing: the last pages are sent in the pause."""

    def __init__(self, session: Session, rounds: Rounds, rest: Rest, trace: WriteTrace) -> None:
        super().__init__(session, rounds, rest)
        self._trace = trace

    @property
    def _sends_before_pause(self) -> bool:
        return any(self._rest)

    async def _finish_memory(self) -> bytes:
        """Send the last pages while the device state is saved; return the state."""
        times, trace = self._session.statistics.times, self._trace
        with times.measure("save"):
            saving = asyncio.create_task(self._save_state())
            sending = asyncio.create_task(self._send_last())
            try:
                state = await saving
                # Saving the state may itself write to memory (devices flush their queues).
                last = await trace.collect()
                await sending
            except BaseException:
                sending.cancel()
                await asyncio.wait((saving, sending))
                raise
        if any(last):
            with times.measure("last pages"):
                await self._send(last)
        fault_point("source.last-pages-sent")
        if self._session.job.options.populate == "hot":
            await self._send_hot()
        return state

    async def _send_last(self) -> None:
        with self._session.statistics.times.measure("last pages"):
            collected, pinned = await asyncio.gather(self._trace.collect(), self._pinned())
            await self._send(union(collected, pinned))

    async def _send_hot(self) -> None:
        for number, hot in enumerate(self._trace.hot):
            units = messages.pack_units([modified > 0 for modified in hot.unit_counts()])
            await self._session.channel.send(messages.Hot(region=number, units=units))


class PostcopySwitchOver(SwitchOver):
    """Switch-over to post-copy: the page service of the session sends the remaining pages afterwards."""

    async def announce(self) -> None:
        """Send an empty round. The destination acknowledges it after allocating huge pages; until then, the workload
        keeps running at the source."""
        sent = await self._rounds.send(self._session.memory.page_sets())
        self.sent.append(sent)

    @property
    def _sends_before_pause(self) -> bool:
        return False

    async def _finish_memory(self) -> bytes:
        """Save the device state, send the sets of missing pages, and start to serve requests for them. Return the
        state."""
        session, times, memory = self._session, self._session.statistics.times, self._session.memory
        assert isinstance(memory, Memory), "clones are migrated in pre-copy mode"
        with times.measure("save"):
            state = await self._save_state()
        if session.trace is not None:
            # An empty round, for pages freed since they were sent: the destination must discard them.
            with times.measure("last pages"):
                await self._send(session.memory.page_sets())
            self._rest = union(union(await session.trace.collect(), self._rest), await self._pinned())
        missing = await off_loop(lambda: memory.data_of(self._rest))
        self._note_remaining(missing)
        await send_missing(session.channel, missing)
        fault_point("source.missing-sent")
        options = session.job.options
        session.service = PageService(memory, missing, session.link.postcopy, options, options.timeout)
        session.service.start()
        return state


def _change(key: str, before: Any, now: Any) -> str:
    """Describe the change of a detail. Long texts are not quoted: they are for programs."""
    if any(isinstance(value, str) and len(value) > MAX_SHOWN for value in (before, now)):
        return f"{key} changed"
    return f"{key} was {before or 'none'}, is now {now or 'none'}"
