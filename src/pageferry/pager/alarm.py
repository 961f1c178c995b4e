"""Pause of a guest that waits for an unreadable page. This is a separate module, because it is rarely needed and slow
to import: a guest waits for the start of its pager.
"""

from __future__ import annotations

import asyncio
import threading

from pageferry.errors import PageferryError, WorkloadDied, WorkloadError
from pageferry.host.qmp import Monitor

_TIMEOUT = 3.0
"""Maximum time to wait for the guest to pause before its pager continues, seconds."""


class PauseRequest:
    """Request to pause a guest by QMP, sent by a separate thread.

    QEMU may not respond before the page is loaded: its main loop waits for the page itself, or for a lock that a vCPU
    holds during its access, or for a vCPU to return from its access. The request then stays open, and the guest pauses
    shortly after the access.
    """

    def __init__(self, qmp_socket: str) -> None:
        self._qmp_socket = qmp_socket
        self.error: str | None = None
        """Reason why QEMU rejected the request; None if it did not."""
        self._thread = threading.Thread(target=self._run, name="pageferry-pause", daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        """Return whether QEMU has not responded yet."""
        return self._thread.is_alive()

    def wait(self) -> str:
        """Wait until QEMU responds, for at most `_TIMEOUT` seconds. Return the state of the guest, for a message."""
        self._thread.join(_TIMEOUT)
        if self.open:
            return "waits at the access, and pauses when the page is loaded: it does not respond to the request yet"
        return "is paused" if self.error is None else f"cannot be paused: {self.error}"

    def _run(self) -> None:
        try:
            asyncio.run(self._stop())
        except (PageferryError, OSError) as failed:
            self.error = str(failed)

    async def _stop(self) -> None:
        while True:
            try:
                monitor = await Monitor.open(self._qmp_socket)
            except WorkloadDied:
                raise
            except WorkloadError:  # no greeting yet
                continue
            async with monitor:
                await monitor.execute("stop")
            return
