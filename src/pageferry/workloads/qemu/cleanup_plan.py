"""Cleanup plan of a QEMU guest: actions of the guardian if the controller, this process, exits. See `guardian`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
from collections.abc import Sequence

from pageferry.host import processes
from pageferry.host.python import start_python
from pageferry.host.qmp import Command
from pageferry.workloads.protocols import OwnershipRecord

log = logging.getLogger(__name__)

_guardians: list[processes.Outliving[bytes]] = []
"""Guardians that may still be running; they are waited for when the next one is started."""


class CleanupPlan:
    """QMP commands that the guardian executes when this process exits or closes the plan."""

    def __init__(self, qmp_socket: str) -> None:
        _guardians[:] = [guardian for guardian in _guardians if guardian.poll() is None]
        self._guardian = start_python(
            "pageferry.workloads.qemu.guardian",
            os.path.abspath(qmp_socket),
            script=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _guardians.append(self._guardian)

    @property
    def guardian(self) -> int:
        """Process id of the guardian."""
        return self._guardian.pid

    def write(
        self, commands: Sequence[Command], *, record: OwnershipRecord | None = None, otherwise: Sequence[Command] = ()
    ) -> None:
        """Replace the plan. The new plan is in effect from now on, even if this process exits at once.

        With a `record`, the guardian reads that file, and executes `otherwise` if the file does not assign the guest
        to this host.
        """
        assert self._guardian.stdin is not None
        will: dict[str, object] = {"commands": list(commands), "otherwise": list(otherwise)}
        if record is not None:
            will["witness"] = [str(record.path), record.contents]
        try:
            self._guardian.stdin.write(json.dumps(will).encode() + b"\n")
            self._guardian.stdin.flush()
        except BrokenPipeError:
            log.warning("the guardian of the guest has exited: if pageferry is killed now, the guest remains as it is")

    def close(self) -> None:
        """Let the guardian execute the plan; it exits afterwards."""
        assert self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guardian.stdin.close()
