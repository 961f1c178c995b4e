"""Whoever connects to a receiver besides the source it receives from: answered, refused, or led on.

A source that is in doubt asks who owns a workload; one that owes pages to a workload of ours, and whose link has gone,
asks the same, hears that not all have come, and goes on sending them.
"""

from __future__ import annotations

import asyncio
import contextlib
from logging import getLogger
from typing import Protocol

from pageferry.errors import PageferryError, PeerRefused, ProtocolError, UsageError
from pageferry.migration import messages
from pageferry.migration.channel import ANSWER, Channel
from pageferry.migration.connection import Reception
from pageferry.migration.ownership import Verdict, Verdicts

log = getLogger(__name__)


class Arrivals(Protocol):
    """What takes the pages of a source that comes back."""

    async def relink(self, channel: Channel, reception: Reception) -> None:
        """The source is at the other end of this channel, and wants to go on. The channel is kept."""


MAX_ASIDE = 8
"""Connections that are attended to at the same time; of more, the oldest is closed."""


class Attendant:
    """Attends to connections of a reception, several at the same time: none of them keeps a source waiting."""

    def __init__(self, reception: Reception, verdicts: Verdicts) -> None:
        self.reception = reception
        self.verdicts = verdicts
        self.migration: str | None = None
        """The one that is received here."""
        self.arrivals: Arrivals | None = None
        """What takes its pages, once it may run here before all of them have come."""
        self.settled = asyncio.Event()
        """Set once the source of it knows what became of it."""
        self._task: asyncio.Task[None] | None = None
        self._aside: dict[asyncio.Task[None], Channel] = {}
        """Connections that are attended to, the oldest first, but those of sources that send pages."""
        self._links: set[asyncio.Task[None]] = set()
        self._linking = asyncio.Lock()

    def begin(self, migration: str) -> None:
        """From now on attend to everybody, in the background."""
        self.migration = migration
        self._task = asyncio.create_task(self._attend())

    async def until_settled(self, timeout: float) -> None:
        """Wait until the source knows, or so long that it must have known, or died: what was decided is on disk."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER * timeout):
                await self.settled.wait()
        if not self.settled.is_set():
            log.warning(
                "the source has not asked what became of the migration; if it ever does, any receiver at %s on this "
                "host tells it",
                self.reception.address,
            )

    def close(self) -> None:
        """Attend to nobody any more."""
        for task in (self._task, *self._aside, *self._links):
            if task is not None:
                task.cancel()

    async def _attend(self) -> None:
        while True:
            self.attend_aside(*await self.reception.control())

    def attend_aside(self, channel: Channel, first: messages.AnyMessage) -> None:
        """Attend to a connection in a task of its own, and close it unless it is in use then."""
        while len(self._aside) >= MAX_ASIDE:
            oldest = next(iter(self._aside))
            del self._aside[oldest]
            oldest.cancel()
        task = asyncio.create_task(self._until_attended(channel, first))
        self._aside[task] = channel
        task.add_done_callback(lambda done: self._aside.pop(done, None))

    async def _until_attended(self, channel: Channel, first: messages.AnyMessage) -> None:
        used = False
        try:
            used = await self.attend_to(channel, first)
        finally:
            if not used:
                await channel.close()

    async def attend_to(self, channel: Channel, first: messages.AnyMessage) -> bool:
        """Answer or refuse; True when the channel is in use from now on."""
        try:
            if isinstance(first, messages.Hello):
                raise UsageError("this receiver receives another workload, or has done so already")
            return await self.answer(channel, first)
        except (PageferryError, OSError) as error:
            if not isinstance(error, PeerRefused):
                log.warning("a source was refused: %s", error)
            await channel.abort(str(error))
            return False

    async def answer(self, channel: Channel, question: messages.AnyMessage) -> bool:
        """Tell a source who owns the workload. Where nothing was decided it is decided now: for the source.

        True when the source owes pages, and sends them over this channel's connections from now on.
        """
        if not isinstance(question, messages.Recover):
            raise ProtocolError(f"the peer began with {type(question).__name__}")
        messages.check_version(question.version)
        migration = question.migration
        if not self.verdicts.knows(migration):
            await channel.send(messages.Outcome(owner="unknown", complete=False))
            return False
        verdict = self.verdicts.decide(migration, Verdict.ABORTED)
        owner: messages.Owner = "destination" if verdict is Verdict.COMMITTED else "source"
        complete = self.verdicts.arrived(migration)
        await channel.send(messages.Outcome(owner=owner, complete=complete))
        ours = migration == self.migration
        if ours and self.arrivals is not None and owner == "destination" and not complete:
            await self._relink(self.arrivals, channel)
            return True
        if ours:
            self.settled.set()
        elif owner == "destination" and not complete:
            await self._refuse_pages(channel)
        return False

    async def _relink(self, arrivals: Arrivals, channel: Channel) -> None:
        """Take the pages of a source that came back; of several connections of it, one after the other."""
        task = asyncio.current_task()
        if task is not None and self._aside.pop(task, None) is not None:
            self._links.add(task)
            task.add_done_callback(self._links.discard)
        async with self._linking:
            await arrivals.relink(channel, self.reception)

    async def _refuse_pages(self, channel: Channel) -> None:
        """It is somebody else on this host whom its pages are for. A source that owes none says nothing, and goes."""
        try:
            await channel.receive(messages.Serve)
        except PageferryError:
            return
        raise UsageError(
            "the workload runs on this host and waits for its pages, but not at this receiver: on this host, start "
            "`pageferry receive --resume NAME` with its name here"
        )
