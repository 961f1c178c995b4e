"""Controller that a test kills: it pauses a guest, optionally saves its state or commits it, and waits.

`python controller.py NAME pause|switch|save|commit` prints the pid and start time of the guest's guardian.
"""

from __future__ import annotations

import asyncio
import sys

from pageferry.host import proc
from pageferry.workloads.qemu.guest import QemuWorkload


async def _ignore(piece: bytes) -> None:
    pass


async def main(name: str, what: str) -> None:
    workload = await QemuWorkload.attach(name)
    if what == "pause":
        await workload.pause()
    else:
        await workload.pause_to_save(_ignore)
    if what in ("save", "commit"):
        await workload.save_state()
    if what == "commit":
        await workload.commit()
    guardian = workload.guardian
    print(guardian, proc.start_time(guardian or 0), flush=True)
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
