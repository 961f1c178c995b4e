"""Client that makes calls to an arena, prints `done` and waits to be killed: `arena_client SOCKET CALL...`."""

from __future__ import annotations

import asyncio
import sys
import time

from pageferry.workloads.arena.control_socket.client import RemoteArena


async def main() -> None:
    arena = await RemoteArena.connect(sys.argv[1])
    for call in sys.argv[2:]:
        await getattr(arena, call)()
    print("done", flush=True)
    time.sleep(60)  # noqa: ASYNC251 - no other task runs


if __name__ == "__main__":
    asyncio.run(main())
