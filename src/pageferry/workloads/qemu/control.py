"""What a controller of a QEMU guest holds on to: the monitor, a last will, and settings that are to be put back.

The monitor is held from `hold` on until the guest has been resumed or let go, so that nobody slows the switch-over
down; otherwise every `session` opens it for itself. While it is held a guardian (`guardian`) knows what is to
happen to the guest if this process dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from pageferry.errors import WorkloadError
from pageferry.host.qmp import Command, Monitor
from pageferry.workloads.protocols import Witness
from pageferry.workloads.qemu import device_state, disks
from pageferry.workloads.qemu.cleanup_plan import CleanupPlan

QUIT: Command = {"execute": "quit"}
_CONT: Command = {"execute": "cont"}

log = logging.getLogger(__name__)


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller has changed of a guest, for the record of its commit: see `QemuWorkload.revert`."""

    paused: bool
    """The guest did not run before it was paused for this."""
    undo: list[dict[str, Any]]
    """QMP commands that put QEMU's migration settings back."""


class QemuControl:
    """The hold of this process on one guest."""

    def __init__(self, name: str, qmp_socket: str) -> None:
        self.stays_paused = False
        """The guest did not run to begin with, and is left so."""
        self.disks_released = False
        """The disks of a guest that stays paused are to be locked again before it is left: no `cont` does that."""
        self.given_up = False
        """QEMU does not answer a command that we do not wait for any more; the guardian carries the will out."""
        self._name = name
        self._qmp_socket = qmp_socket
        self._held: Monitor | None = None
        self._will: CleanupPlan | None = None
        self._undo: list[Command] | None = None
        """Commands that put QEMU's migration settings back; None while they are the user's."""
        self._settling: asyncio.Task[None] | None = None

    @property
    def undo(self) -> list[Command]:
        """Commands that put QEMU's migration settings back."""
        return self._undo or []

    def give_up(self) -> None:
        """Leave a QEMU that does not answer to the guardian, which carries the will out when it does."""
        self.given_up = True
        self.abandon()

    @property
    def guardian(self) -> int | None:
        """Pid of the process that acts if we die; None while there is no need for one."""
        return self._will.guardian if self._will is not None else None

    @property
    def prepared(self) -> bool:
        """Whether QEMU's migration is set up by `prepare_state`."""
        return self._undo is not None

    async def hold(self) -> Monitor:
        """The monitor, kept from now on. Raises WorkloadError, WorkloadDied."""
        await self.settled()
        if self._held is None:
            self._held = await Monitor.open(self._qmp_socket)
        return self._held

    @contextlib.asynccontextmanager
    async def session(self, *, keep: bool = False) -> AsyncIterator[Monitor]:
        """The monitor for a few commands: the one that is held, or one of their own, which `keep` holds after them."""
        await self.settled()
        if self._held is not None:
            yield self._held
            return
        async with contextlib.AsyncExitStack() as stack:
            monitor = await stack.enter_async_context(await Monitor.open(self._qmp_socket))
            yield monitor
            if keep:
                self._held = monitor
                stack.pop_all()

    async def note_status(self, monitor: Monitor) -> str:
        """Record whether the guest runs, and return QEMU's name of its run state."""
        status = await monitor.execute("query-status")
        self.stays_paused = not status["running"]
        return str(status["status"])

    async def prepare_state(self, monitor: Monitor, *, incoming: bool = False) -> None:
        """Set QEMU's migration up for the device state alone; the settings of before are put back in the end."""
        if self._undo is None:
            settings = await device_state.plan(monitor, incoming=incoming)
            self._undo = settings.undo
            # First the will: if this process is killed between two commands, the guardian puts all of them back.
            if self._undo and self._held is monitor:
                self.bequeath(self._undo)
            for command in settings.apply:
                await monitor.run(command)

    # -- what is to happen if we die -----------------------------------------------------------------------------------

    def have_will(self) -> None:
        """From now on there is a guardian, whose will is empty."""
        if self._will is None:
            self._will = CleanupPlan(self._qmp_socket)

    def bequeath(self, commands: Sequence[Command]) -> None:
        """They are the will."""
        if self._will is not None:
            self._will.write(commands)

    def bequeath_as_before(self, first: Sequence[Command] = ()) -> None:
        """The will is what makes a paused guest as it was before, after the commands that come `first`."""
        self.bequeath([*first, *self._as_before()])

    def bequeath_to_owner(self, witness: Witness) -> None:
        """The guest is as it was before where the witness says that it is ours, and ends where it does not."""
        if self._will is not None:
            self._will.write(self._as_before(), witness=witness, otherwise=[QUIT])

    def _as_before(self) -> list[Command]:
        locked = [disks.LOCK] if self.disks_released else []
        return [*(locked if self.stays_paused else [_CONT]), *(self._undo or [])]

    # -- what another process undoes ---------------------------------------------------------------------------------

    @property
    def changes(self) -> Changes:
        """What this process has changed so far."""
        return Changes(paused=self.stays_paused, undo=self._undo or [])

    def take_over(self, changes: Changes) -> None:
        """Answer for the changes of a process that has ended after `commit`."""
        self.stays_paused = self.disks_released = changes.paused
        self._undo = changes.undo

    # -- the end of it -------------------------------------------------------------------------------------------------

    def settle(self, monitor: Monitor) -> None:
        """The guest has been resumed. The settings are put back, and all is let go, while nobody waits for it."""
        self.stays_paused = self.disks_released = False
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

    async def settled(self) -> None:
        """Wait until the settings of a guest that was resumed are put back."""
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
