"""What is to happen to a QEMU guest if its controller, this process, is lost: see `guardian`."""

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
from pageferry.workloads.protocols import Witness

log = logging.getLogger(__name__)

_guardians: list[processes.Outliving[bytes]] = []
"""Those that may still be at work, to be waited for when the next one is started."""


class CleanupPlan:
    """QMP commands that are carried out when this process dies, or closes the will."""

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
        """Pid of the process that keeps the will."""
        return self._guardian.pid

    def write(
        self, commands: Sequence[Command], *, witness: Witness | None = None, otherwise: Sequence[Command] = ()
    ) -> None:
        """Replace the will. It holds from here on, even if this process dies at once.

        With a `witness` it is looked at then: `otherwise` is done where it does not say that the guest is ours.
        """
        assert self._guardian.stdin is not None
        will: dict[str, object] = {"commands": list(commands), "otherwise": list(otherwise)}
        if witness is not None:
            will["witness"] = [str(witness.path), witness.says]
        try:
            self._guardian.stdin.write(json.dumps(will).encode() + b"\n")
            self._guardian.stdin.flush()
        except BrokenPipeError:
            log.warning("the guardian of the guest has exited: if pageferry is killed now, the guest remains as it is")

    def close(self) -> None:
        """Let the guardian carry out the will; it goes away by itself."""
        assert self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guardian.stdin.close()
