"""Pauses a guest that waits for an unreadable page. A separate module, because it is rarely needed and slow to import,
and a guest waits for its pager to start.
"""

from __future__ import annotations

import asyncio

from pageferry.errors import PageferryError
from pageferry.host.qmp import Monitor

_TIMEOUT = 3.0
"""Maximum time for the guest to stop, seconds."""


def stop_guest(qmp_socket: str) -> bool:
    """Request a guest to pause. Return False if its vCPUs do not return from the access in time.

    It pauses as soon as they do, so it does not run by itself after another pager has loaded the page.
    """
    try:
        asyncio.run(_stop(qmp_socket))
    except (PageferryError, TimeoutError, OSError):
        return False
    return True


async def _stop(qmp_socket: str) -> None:
    async with asyncio.timeout(_TIMEOUT), await Monitor.open(qmp_socket) as monitor:
        await monitor.execute("stop")
