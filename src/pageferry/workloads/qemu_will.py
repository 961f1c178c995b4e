"""What is to happen to a QEMU guest if its controller, this process, is lost: see `qemu_guardian`."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pageferry.host import processes
from pageferry.workloads import qemu_guardian
from pageferry.workloads.qmp import Command

log = logging.getLogger(__name__)

_guardians: list[processes.Outliving[str]] = []
"""Those that may still be at work, to be waited for when the next one is started."""


class LastWill:
    """QMP commands that are carried out when this process dies, or closes the will."""

    def __init__(self, qmp_socket: str) -> None:
        _guardians[:] = [guardian for guardian in _guardians if guardian.poll() is None]
        # Isolated and without site-packages: it starts in a few milliseconds, and nothing can get in its way.
        self._guardian = processes.Outliving(
            [sys.executable, "-I", "-S", str(Path(qemu_guardian.__file__)), qmp_socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        _guardians.append(self._guardian)

    @property
    def guardian(self) -> int:
        """Pid of the process that keeps the will."""
        return self._guardian.pid

    def write(self, commands: Sequence[Command]) -> None:
        """Replace the will. It holds from here on, even if this process dies at once."""
        assert self._guardian.stdin is not None
        try:
            self._guardian.stdin.write(json.dumps(list(commands)) + "\n")
            self._guardian.stdin.flush()
        except BrokenPipeError:
            log.warning("the guest's guardian is gone: if pageferry is killed now, the guest stays as it is")

    def close(self) -> None:
        """Let the guardian carry out the will; it goes away by itself."""
        assert self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guardian.stdin.close()
