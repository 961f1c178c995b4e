"""Recovery server of a receiver: serves all connections other than that of the current source.

A source that has committed without receiving a reply sends Recover to learn the owner of the workload. A source that
has lost its link in post-copy also sends Recover, learns that pages are missing, and continues to send them.
"""

from __future__ import annotations

import asyncio
import contextlib
from logging import getLogger
from typing import Protocol

from pageferry.errors import PageferryError, PeerRefused, ProtocolError, UsageError
from pageferry.migration.ownership import CommitDecision, CommitDecisions
from pageferry.migration.transport import messages
from pageferry.migration.transport.channel import ANSWER, Channel
from pageferry.migration.transport.connection import ConnectionListener

log = getLogger(__name__)


class Arrivals(Protocol):
    """Receiver of the pages of a source that reconnects."""

    async def reconnect(self, channel: Channel, connections: ConnectionListener) -> None:
        """Take over `channel`, and receive pages from the source that is connected to it."""


MAX_ASIDE = 8
"""Maximum number of connections served at the same time; for a further connection, the oldest is closed."""


class RecoveryServer:
    """Server of the connections of a listener. It serves them concurrently, so that none of them delays a source."""

    def __init__(self, connections: ConnectionListener, decisions: CommitDecisions) -> None:
        self.connections = connections
        self.decisions = decisions
        self.migration: str | None = None
        """Identifier of the migration that is being received."""
        self.arrivals: Arrivals | None = None
        """Receiver of the missing pages; None unless the workload may run before all of its pages are received."""
        self.acknowledged = asyncio.Event()
        """Event that is set once the source of this migration knows the outcome."""
        self._task: asyncio.Task[None] | None = None
        self._aside: dict[asyncio.Task[None], Channel] = {}
        """Tasks that serve a connection, oldest first, except those in `_links`."""
        self._links: set[asyncio.Task[None]] = set()
        """Tasks that serve a source which sends pages."""
        self._linking = asyncio.Lock()

    def begin(self, migration: str) -> None:
        """Start to serve connections in the background."""
        self.migration = migration
        self._task = asyncio.create_task(self._attend())

    async def wait_acknowledged(self, timeout: float) -> None:
        """Wait until the source knows the outcome, for at most `ANSWER` times `timeout` seconds. After that time, log a
        warning. The decision is durable in any case."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER * timeout):
                await self.acknowledged.wait()
        if not self.acknowledged.is_set():
            log.warning(
                "the source has not requested the outcome of the migration; a receiver at %s on this host will "
                "reply to a later request",
                self.connections.address,
            )

    def close(self) -> None:
        """Stop serving connections."""
        for task in (self._task, *self._aside, *self._links):
            if task is not None:
                task.cancel()

    async def _attend(self) -> None:
        while True:
            self.attend_aside(*await self.connections.control())

    def attend_aside(self, channel: Channel, first: messages.AnyMessage) -> None:
        """Serve a connection in a separate task, which closes it unless the connection has been taken over."""
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
        """Reply to the first message, or refuse it. Return whether the channel has been taken over."""
        try:
            if isinstance(first, messages.Hello):
                raise UsageError(
                    f"cannot receive {first.name}: this receiver has accepted another workload; start another receiver"
                )
            return await self.answer(channel, first)
        except (PageferryError, OSError) as error:
            if not isinstance(error, PeerRefused):
                log.warning("a source was refused: %s", error)
            await channel.abort(str(error))
            return False

    async def answer(self, channel: Channel, request: messages.AnyMessage) -> bool:
        """Reply to Recover with the owner of the workload. If there is no decision yet, decide ABORTED: the owner is
        the source.

        Return whether the channel has been taken over by a source that sends missing pages.
        """
        if not isinstance(request, messages.Recover):
            raise ProtocolError(f"the peer sent {type(request).__name__} as its first message")
        messages.check_version(request.version)
        migration = request.migration
        if not self.decisions.knows(migration):
            await channel.send(messages.Outcome(owner="unknown", complete=False))
            return False
        decision = self.decisions.decide(migration, CommitDecision.ABORTED)
        owner: messages.Owner = "destination" if decision is CommitDecision.COMMITTED else "source"
        complete = self.decisions.arrived(migration)
        await channel.send(messages.Outcome(owner=owner, complete=complete))
        ours = migration == self.migration
        if ours and self.arrivals is not None and owner == "destination" and not complete:
            await self._reconnect(self.arrivals, channel)
            return True
        if ours:
            self.acknowledged.set()
        elif owner == "destination" and not complete:
            await self._refuse_pages(channel)
        return False

    async def _reconnect(self, arrivals: Arrivals, channel: Channel) -> None:
        """Receive pages from a source that has reconnected. Only one such connection is served at a time."""
        task = asyncio.current_task()
        if task is not None and self._aside.pop(task, None) is not None:
            self._links.add(task)
            task.add_done_callback(self._links.discard)
        async with self._linking:
            await arrivals.reconnect(channel, self.connections)

    async def _refuse_pages(self, channel: Channel) -> None:
        """Refuse pages of a workload that is received by another receiver of this host. A source without missing pages
        sends nothing and closes the connection."""
        try:
            await channel.receive(messages.Serve)
        except PageferryError:
            return
        raise UsageError(
            "cannot receive the missing pages: the workload belongs to the host of this receiver, but this receiver "
            "does not serve it; start `pageferry receive --resume NAME` on that host"
        )
