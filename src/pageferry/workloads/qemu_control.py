"""What a controller of a QEMU guest holds on to: the monitor, a last will, and settings that are to be put back.

The monitor is held from `hold` on until the guest has been resumed or let go, so that nobody slows the switch-over
down; otherwise every `session` opens it for itself. While it is held a guardian (`qemu_guardian`) knows what is to
happen to the guest if this process dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from pageferry.errors import WorkloadError
from pageferry.workloads import qemu_state
from pageferry.workloads.base import Witness
from pageferry.workloads.qemu_will import LastWill
from pageferry.workloads.qmp import Command, Monitor

QUIT: Command = {"execute": "quit"}

log = logging.getLogger(__name__)


class QemuControl:
    """The hold of this process on one guest."""

    def __init__(self, name: str, qmp_socket: str) -> None:
        self.stays_paused = False
        """The guest did not run to begin with, and is left so."""
        self._name = name
        self._qmp_socket = qmp_socket
        self._held: Monitor | None = None
        self._will: LastWill | None = None
        self._undo: list[Command] | None = None
        """Commands that put QEMU's migration settings back; None while they are the user's."""
        self._settling: asyncio.Task[None] | None = None

    @property
    def guardian(self) -> int | None:
        """Pid of the process that acts if we die; None while there is no need for one."""
        return self._will.guardian if self._will is not None else None

    async def hold(self) -> Monitor:
        """The monitor, kept from now on. Raises WorkloadError, WorkloadDied."""
        await self._settled()
        if self._held is None:
            self._held = await Monitor.open(self._qmp_socket)
        return self._held

    @contextlib.asynccontextmanager
    async def session(self, *, keep: bool = False) -> AsyncIterator[Monitor]:
        """The monitor for a few commands: the one that is held, or one of their own, which `keep` holds after them."""
        await self._settled()
        if self._held is not None:
            yield self._held
            return
        async with contextlib.AsyncExitStack() as stack:
            monitor = await stack.enter_async_context(await Monitor.open(self._qmp_socket))
            yield monitor
            if keep:
                self._held = monitor
                stack.pop_all()

    async def note_status(self, monitor: Monitor) -> None:
        """Look whether the guest runs."""
        self.stays_paused = not (await monitor.execute("query-status"))["running"]

    async def prepare_state(self, monitor: Monitor) -> None:
        """Set QEMU's migration up for the device state alone; what it was before is put back in the end."""
        if self._undo is None:
            self._undo = await qemu_state.prepare(monitor)
            if self._undo and self._held is monitor:
                self.bequeath(self._undo)

    # -- what is to happen if we die -----------------------------------------------------------------------------------

    def have_will(self) -> None:
        """From now on there is a guardian, whose will is empty."""
        if self._will is None:
            self._will = LastWill(self._qmp_socket)

    def bequeath(self, commands: Sequence[Command]) -> None:
        """They are the will."""
        if self._will is not None:
            self._will.write(commands)

    def bequeath_as_before(self) -> None:
        """What makes a paused guest as it was before is the will."""
        self.bequeath(self._as_before())

    def bequeath_to_owner(self, witness: Witness) -> None:
        """The guest is as it was before where the witness says that it is ours, and ends where it does not."""
        if self._will is not None:
            self._will.write(self._as_before(), witness=witness, otherwise=[QUIT])

    def _as_before(self) -> list[Command]:
        return [*([] if self.stays_paused else [{"execute": "cont"}]), *(self._undo or [])]

    # -- the end of it -------------------------------------------------------------------------------------------------

    def settle(self, monitor: Monitor) -> None:
        """The guest has been resumed. The settings are put back, and all is let go, while nobody waits for it."""
        self.stays_paused = False
        self.bequeath(self._undo or [])
        self._settling = asyncio.create_task(self._settle(monitor))

    async def _settle(self, monitor: Monitor) -> None:
        try:
            for command in self._undo or []:
                await monitor.run(command)
            self._undo = None
            self.bequeath([])
        except WorkloadError as failed:  # the guardian will have another try
            log.debug("%s: %s", self._name, failed)
        finally:
            if self._held is monitor:
                self._held = None
                monitor.abandon()
            self._close_will()

    async def _settled(self) -> None:
        if self._settling is not None:
            settling, self._settling = self._settling, None
            await settling

    async def let_go(self) -> None:
        """Of the monitor, and of the guardian, who carries the will out."""
        if self._held is not None:
            monitor, self._held = self._held, None
            await monitor.close()
        self._close_will()

    def abandon(self) -> None:
        """As `let_go`, without a word to the monitor."""
        if self._held is not None:
            self._held.abandon()
            self._held = None
        self._close_will()

    def _close_will(self) -> None:
        if self._will is not None:
            self._will.close()
            self._will = None
