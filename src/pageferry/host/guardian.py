"""Guardians: small processes that undo temporary changes if this process exits before it has undone them.

A command that has stopped a guest, set a limit or changed a setting of the kernel can be killed at any time. The
command therefore first starts a guardian, and sends it a plan. `guardian_process` executes the plan at the end of its
standard input: when this process closes the guardian, or exits.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Sequence
from typing import Any

import msgspec

from pageferry.host import processes
from pageferry.host.python import start_python

log = logging.getLogger(__name__)

_running: list[processes.Outliving[bytes]] = []
"""Guardians that may still be running. Those that have exited are reaped when the next guardian is started."""


class WriteFile(msgspec.Struct, frozen=True, tag_field="do", tag="write"):
    """Action that writes a text to an existing file."""

    file: str
    text: str


class EmptyGroup(msgspec.Struct, frozen=True, tag_field="do", tag="empty-group"):
    """Action that moves all processes of a control group (v1) to its parent, and removes the group."""

    group: str
    parent: str


class SendSignal(msgspec.Struct, frozen=True, tag_field="do", tag="signal"):
    """Action that sends a signal to a process."""

    pidfd: int
    """Descriptor that the guardian has inherited (`descriptors`)."""
    number: int


class MonitorCommands(msgspec.Struct, frozen=True, tag_field="do", tag="qmp"):
    """Action that cancels a running migration and executes QMP commands. A command that QEMU refuses does not prevent
    the next ones."""

    socket: str
    commands: Sequence[dict[str, Any]]
    jobs: Sequence[str] = ()
    """Block jobs to end after the commands. Each has a target node of the same name, which is removed."""


class RemoveFiles(msgspec.Struct, frozen=True, tag_field="do", tag="remove"):
    """Action that removes files that this process has created, and whose contents are incomplete."""

    files: Sequence[str]


class PutRequest(msgspec.Struct, frozen=True, tag_field="do", tag="put"):
    """Action that sends a PUT request to an HTTP server on a Unix socket, until it is accepted."""

    socket: str
    path: str


class Decide(msgspec.Struct, frozen=True, tag_field="do", tag="decide"):
    """Action that executes `then` if the file has the given contents, otherwise `otherwise`."""

    file: str
    contents: str
    then: Sequence[Action]
    otherwise: Sequence[Action]


Action = WriteFile | EmptyGroup | SendSignal | MonitorCommands | RemoveFiles | PutRequest | Decide


class Guardian:
    """Running guardian, with an empty plan at first."""

    def __init__(self, purpose: str, descriptors: Sequence[int] = ()) -> None:
        """Start the process. `purpose`: text for error messages and for the command line of the guardian.
        `descriptors`: file descriptors that the guardian inherits. Raises OSError."""
        _running[:] = [process for process in _running if process.poll() is None]
        self._purpose = purpose
        self._process = start_python(
            "pageferry.host.guardian_process",
            purpose,
            script=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
        )
        _running.append(self._process)

    @property
    def pid(self) -> int:
        """Process id of the guardian."""
        return self._process.pid

    def confirm(self) -> bool:
        """Wait until the guardian runs. Return False if it has not started."""
        assert self._process.stdout is not None
        return self._process.stdout.readline() == b"ready\n"

    def plan(self, actions: Sequence[Action]) -> None:
        """Replace the plan. The new plan is in effect from now on, even if this process exits at once. If the guardian
        has exited, a warning is logged."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(actions) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            log.warning("the guardian of %s has exited: nothing is undone if pageferry is killed now", self._purpose)

    def close(self) -> None:
        """Make the guardian execute the plan and exit, without waiting for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def finish(self, timeout: float | None = None) -> bool:
        """Make the guardian execute the plan, and wait for its exit. Return whether all actions succeeded.

        Raises TimeoutError after `timeout` seconds.
        """
        self.close()
        try:
            return self._process.wait(timeout) == 0
        except subprocess.TimeoutExpired as expired:
            raise TimeoutError(
                f"cannot end the guardian of {self._purpose}: it has not exited within {timeout:g} s"
            ) from expired
