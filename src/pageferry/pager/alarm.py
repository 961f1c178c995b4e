"""What a pager does when its guest waits for a page that cannot be had. Apart, because it is seldom needed and slow to
import, and a guest waits for its pager to start.
"""

from __future__ import annotations

import asyncio

from pageferry.errors import PageferryError
from pageferry.host.qmp import Monitor

_TIMEOUT = 3.0
"""Seconds for the guest to stop."""


def stop_guest(qmp_socket: str) -> bool:
    """Tell a guest to pause. False: it has been told, but its processors do not come back from the access.

    It is paused as soon as they do, so it does not run on by itself when another pager has brought the page.
    """
    try:
        asyncio.run(_stop(qmp_socket))
    except (PageferryError, TimeoutError, OSError):
        return False
    return True


async def _stop(qmp_socket: str) -> None:
    async with asyncio.timeout(_TIMEOUT), await Monitor.open(qmp_socket) as monitor:
        await monitor.execute("stop")
