"""Pause of a guest that waits for an unreadable page. This is a separate module, because it is rarely needed and slow
to import: a guest waits for the start of its pager.
"""

from __future__ import annotations

import asyncio

from pageferry.errors import PageferryError
from pageferry.host.qmp import Monitor

_TIMEOUT = 3.0
"""Maximum time for the guest to stop, seconds."""


def stop_guest(qmp_socket: str) -> bool:
    """Request a pause of a guest by QMP. Return False if the guest does not pause within `_TIMEOUT` seconds, or if QMP
    fails.

    A guest whose vCPUs wait for the page pauses as soon as they return from the access. It therefore does not continue
    to run when another pager has loaded the page.
    """
    try:
        asyncio.run(_stop(qmp_socket))
    except (PageferryError, TimeoutError, OSError):
        return False
    return True


async def _stop(qmp_socket: str) -> None:
    async with asyncio.timeout(_TIMEOUT), await Monitor.open(qmp_socket) as monitor:
        await monitor.execute("stop")
