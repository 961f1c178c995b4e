"""Monitor, cleanup plan and changed settings of a QEMU guest, for the process that controls it.

From `hold` until the guest is resumed or released, the monitor is kept open, so that no other client delays the
switch-over. Otherwise, each `session` opens a connection to the monitor. While the monitor is kept open, the guardian
(`host.guardian`) has a cleanup plan for the guest, and executes it if this process exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from pageferry.errors import WorkloadError
from pageferry.host.guardian import Action, Decide, Guardian, MonitorCommands
from pageferry.host.qmp import Command, Monitor
from pageferry.workloads.protocols import OwnershipRecord
from pageferry.workloads.qemu import announcement, device_state, disks

QUIT: Command = {"execute": "quit"}
_CONT: Command = {"execute": "cont"}

log = logging.getLogger(__name__)


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """Changes that a controller has made to a guest. They are part of the record of the commit: see
    `QemuWorkload.revert`."""

    paused: bool
    """Whether the guest was already paused before the controller paused it."""
    undo: list[dict[str, Any]]
    """QMP commands that restore QEMU's migration settings."""


class QemuControl:
    """Control of one guest by this process."""

    def __init__(self, name: str, qmp_socket: str) -> None:
        self.stays_paused = False
        """Whether the guest was paused by its user, and stays paused after the operation."""
        self.disks_released = False
        """Whether the disks of a guest that stays paused must be locked again at the end of the operation. For other
        guests, `cont` locks the disks."""
        self.given_up = False
        """Whether this process has stopped waiting for QEMU, which has not replied to a command.

        The guardian then executes the cleanup plan.
        """
        self._name = name
        self._qmp_socket = qmp_socket
        self._held: Monitor | None = None
        self._guardian: Guardian | None = None
        self._undo: list[Command] | None = None
        """Commands that restore QEMU's migration settings, and those of `undo_first`; None while the settings are
        unchanged."""
        self._settling: asyncio.Task[None] | None = None
        self._planned: Sequence[Command] = ()
        """Commands of the cleanup plan."""
        self.mirrors: tuple[str, ...] = ()
        """Block jobs that copy disks, each with a target of the same name. Every cleanup plan removes them."""

    @property
    def undo(self) -> list[Command]:
        """Commands that restore QEMU's migration settings."""
        return self._undo or []

    def give_up(self) -> None:
        """Stop waiting for QEMU. The guardian executes the cleanup plan as soon as QEMU replies."""
        self.given_up = True
        self.abandon()

    @property
    def guardian(self) -> int | None:
        """Process id of the guardian, which executes the cleanup plan if this process exits; None while there is no
        guardian."""
        return self._guardian.pid if self._guardian is not None else None

    @property
    def prepared(self) -> bool:
        """Whether `prepare_state` has set up QEMU's migration."""
        return self._undo is not None

    async def hold(self) -> Monitor:
        """Open the monitor if necessary, and keep it open. Return the monitor. Raises WorkloadError, WorkloadDied."""
        await self.settled()
        if self._held is None:
            self._held = await Monitor.open(self._qmp_socket)
        return self._held

    @contextlib.asynccontextmanager
    async def session(self, *, keep: bool = False) -> AsyncIterator[Monitor]:
        """Yield the open monitor, or a new connection for the block. `keep`: keep the new connection open afterwards.
        Raises WorkloadError, WorkloadDied."""
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
        """Record whether the guest runs, and return QEMU's name for the run state."""
        status = await monitor.execute("query-status")
        self.stays_paused = not status["running"]
        return str(status["status"])

    async def prepare_state(self, monitor: Monitor, *, incoming: bool = False) -> None:
        """Set up QEMU's migration for the device state alone. `settle` or the cleanup plan restores the previous
        settings."""
        if self._undo is None:
            settings = await device_state.plan(monitor, incoming=incoming)
            self._undo = settings.undo
            # Set the plan first: if this process is killed between two commands, the guardian restores all settings.
            if self._undo and self._held is monitor:
                self.plan(self._undo)
            await asyncio.gather(*map(monitor.run, settings.apply))

    def undo_first(self, commands: Sequence[Command]) -> None:
        """Have these commands executed before QEMU's migration settings are restored, either after the guest has
        resumed or by the cleanup plan. Call this before the change that they undo, and after `prepare_state`."""
        self._undo = [*commands, *(self._undo or [])]
        self.plan(self._undo)

    # -- cleanup plan

    def start_guardian(self) -> None:
        """Start a guardian with an empty cleanup plan, unless one is running."""
        if self._guardian is None:
            self._guardian = Guardian(f"the guest {self._name}, {os.path.abspath(self._qmp_socket)}")

    def plan(self, commands: Sequence[Command]) -> None:
        """Replace the cleanup plan with these commands. Do nothing without a guardian."""
        self._planned = commands
        if self._guardian is not None:
            self._guardian.plan(self._actions(commands))

    def plan_to_restore(self, first: Sequence[Command] = ()) -> None:
        """Replace the cleanup plan with `first` and the commands that restore the guest as it was before the pause."""
        self.plan([*first, *self._as_before()])

    def plan_mirrors(self, names: tuple[str, ...]) -> None:
        """Add the removal of these copies of disks to every cleanup plan, in place of those of an earlier call."""
        self.mirrors = names
        self.plan(self._planned)

    def plan_by_owner(self, record: OwnershipRecord, first: Action) -> None:
        """Replace the cleanup plan with a decision: execute `first` and restore the guest if the file of `record`
        assigns the guest to this host, otherwise end it."""
        if self._guardian is not None:
            restore, end = [first, *self._actions(self._as_before())], self._actions([QUIT])
            self._guardian.plan([Decide(str(record.path), record.contents, restore, end)])

    def _actions(self, commands: Sequence[Command]) -> list[Action]:
        if not commands and not self.mirrors:
            return []
        return [MonitorCommands(os.path.abspath(self._qmp_socket), commands, self.mirrors)]

    def _as_before(self) -> list[Command]:
        locked = [disks.LOCK] if self.disks_released else []
        resumed = locked if self.stays_paused else [_CONT, announcement.COMMAND]
        return [*resumed, *(self._undo or [])]

    # -- changes that another process undoes

    @property
    def changes(self) -> Changes:
        """Changes that this process has made so far."""
        return Changes(paused=self.stays_paused, undo=self._undo or [])

    def take_over(self, changes: Changes) -> None:
        """Take over the changes of a process that has exited after `commit`."""
        self.stays_paused = self.disks_released = changes.paused
        self._undo = changes.undo

    # -- release

    def settle(self, monitor: Monitor) -> None:
        """Start a background task that restores the settings of a resumed guest, and releases the monitor."""
        self.stays_paused = self.disks_released = False
        self.plan(self._undo or [])
        self._settling = asyncio.create_task(self._settle(monitor))

    async def _settle(self, monitor: Monitor) -> None:
        try:
            for command in self._undo or []:
                await monitor.run(command)
            self._undo = None
            self.plan([])
        except WorkloadError as failed:  # the guardian retries
            log.debug("%s: %s", self._name, failed)
        finally:
            if self._held is monitor:
                self._held = None
                monitor.abandon()
            self._close_guardian()

    async def settled(self) -> None:
        """Wait until the settings of a resumed guest are restored."""
        if self._settling is not None:
            await asyncio.shield(self._settling)

    def abandon(self) -> None:
        """Close the monitor without sending a command. Close the guardian, which then executes the cleanup plan."""
        if self._held is not None:
            self._held.abandon()
            self._held = None
        self._close_guardian()

    def _close_guardian(self) -> None:
        if self._guardian is not None:
            self._guardian.close()
            self._guardian = None
