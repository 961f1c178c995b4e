"""Pause of a guest that waits for an unreadable page. This code is a separate module because it is slow to import and
rarely needed, and a guest waits while its pager starts.
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

    QEMU may be unable to respond before the page is loaded: its main loop waits for the page, for a lock that the
    accessing vCPU holds, or for that vCPU to complete its access. The request then stays open, and the guest pauses
    shortly after the access.
    """

    def __init__(self, qmp_socket: str) -> None:
        self._qmp_socket = qmp_socket
        self.error: str | None = None
        """Reason why the request failed; None if it has not failed."""
        self._thread = threading.Thread(target=self._run, name="pageferry-pause", daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        """Whether QEMU has not responded yet."""
        return self._thread.is_alive()

    def wait(self) -> str:
        """Wait until QEMU responds, for at most `_TIMEOUT` seconds. Return the state of the guest
        as a predicate, such as "is paused"."""
        self._thread.join(_TIMEOUT)
        if self.open:
            return "waits at the access, and pauses when the page is loaded: QEMU has not responded to the request yet"
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
