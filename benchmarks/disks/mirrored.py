"""Migration of a guest with two local disks: by pageferry, and by the same steps of QEMU, which a script drives.

The script uses the library `qemu.qmp`. It exports the disks of the destination by NBD, mirrors those of the source
until they are ready, migrates the guest with `pause-before-switchover`, ends the mirrors and the exports in the pause,
and continues. The guest writes to both disks continuously.
"""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, QMPClient

from benchmarks.harness import machine
from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.harness.tables import Run
from benchmarks.migrate.guest import Line, Running
from benchmarks.migrate.guest import Place as Files
from benchmarks.migrate.pageferry_line import PageferryLine
from benchmarks.migrate.side_by_side import Method, booted
from benchmarks.peers.qemu import QemuLine
from tests.guest import initrd

DISKS = 2
FULL, SMALL = 512 << 20, 16 << 20
"""Size of a disk, bytes. All of it contains data."""
LOAD = "ferry.kib=512 ferry.rate=250 ferry.verify=250 ferry.tick=10"
"""Options of the disk checker: 1 MiB written per second. It fills its area slowly, by programmed I/O."""
SMALL_LOAD = "ferry.kib=64 ferry.rate=20 ferry.verify=20 ferry.tick=10"
MODES = ("background", "write-blocking")


def measure(setting: Setting) -> list[Run]:
    """Measure both methods, alternately. The copy modes of QEMU's mirrors are two methods."""
    size = SMALL if setting.quick else FULL
    checker = initrd.build(machine.CHECKER.with_name("disk-checker"), source=initrd.DISK_CHECKER)
    files = replace(Files.of_checker(setting), initrd=checker)
    load = SMALL_LOAD if setting.quick else LOAD
    ours = CopyingPageferry("pageferry disks", files, machine.QEMU, load)
    theirs = MirroringQemu("QEMU disks", files, machine.QEMU, load)
    ours.size = theirs.size = size
    methods: list[tuple[Line, list[Method]]] = [
        (theirs, [(f"QEMU, {mode}", {"mode": mode}) for mode in MODES]),
        (ours, [("pageferry", {})]),
    ]
    runs: list[Run] = []
    with Ballast(files.reserve) as ballast, booted(methods) as lines:
        ballast.hold()
        for _ in range(setting.repetitions):
            for line, each in lines:
                for name, options in each:
                    run = line.move(ballast, **options)
                    line.rest()
                    for path in disks(line, line.hops - 1, size):
                        path.unlink()
                    runs.append({"method": name} | run)
    return runs


def disks(line: Line, number: int, size: int) -> list[Path]:
    """Return the disks of QEMU number `number`. Those of the first are created with data, all others empty."""
    paths = [line.place.folder / f"{line.stem}.{number}.disk{disk}" for disk in range(DISKS)]
    for path in paths:
        if not path.exists():
            with path.open("wb") as file:
                file.write(os.urandom(size) if number == 0 else b"")
                file.truncate(size)
    return paths


def drives(line: Line, number: int, size: int) -> list[str]:
    """Return the options that attach the disks."""
    paths = disks(line, number, size)
    options = (f"file={path},format=raw,if=ide,id=disk{disk}" for disk, path in enumerate(paths))
    return [word for option in options for word in ("-drive", option)]


class CopyingPageferry(PageferryLine):
    """Guest whose disks pageferry copies."""

    size = FULL

    def command(self, number: int) -> list[str]:
        return [*super().command(number), *drives(self, number, self.size)]

    def begin(self, source: Running, options: dict[str, Any]) -> None:
        super().begin(source, {"words": ("--copy-disks",)})


class MirroringQemu(QemuLine):
    """Guest whose disks a script copies. Option of a migration: `mode`, the copy mode of the mirrors."""

    size = FULL

    def command(self, number: int) -> list[str]:
        script = f"unix:{self._steps_file(number)},server=on,wait=off"
        return [*super().command(number), *drives(self, number, self.size), "-qmp", script]

    def accept(self, destination: Running) -> None:
        self.set_up(destination, {"late-block-activate": True})
        destination.monitor.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        (listening,) = destination.monitor.execute("query-migrate")["socket-address"]
        self._address = f"tcp:127.0.0.1:{listening['port']}"

    def begin(self, source: Running, options: dict[str, Any]) -> None:
        self.set_up(source, {"pause-before-switchover": True})
        steps = _steps(self._steps_file(self.hops - 1), self._steps_file(self.hops), self._address, options["mode"])
        threading.Thread(target=asyncio.run, args=(steps,), daemon=True).start()

    def _steps_file(self, number: int) -> Path:
        return self.place.folder / f"{self.stem}.{number}.script"


async def _steps(source: Path, destination: Path, address: str, mode: str) -> None:
    """Move a guest and its disks between two QEMUs, by the steps of QEMU's documentation (live-block-operations)."""
    here, there = QMPClient(), QMPClient()
    await here.connect(str(source))
    await there.connect(str(destination))
    ended, moved = EventListener(("BLOCK_JOB_COMPLETED",)), EventListener(("MIGRATION",))
    here.register_listener(ended)
    here.register_listener(moved)
    with here.listener(("BLOCK_JOB_READY",)) as ready:
        jobs = await _mirror(here, there, str(destination.with_suffix(".nbd")), mode)
        for _ in jobs:
            await ready.get()
    await here.execute("migrate", {"uri": address})
    status = ""
    while status != "pre-switchover":
        event: Any = await moved.get()
        status = event["data"]["status"]
    for job in jobs:
        await here.execute("block-job-cancel", {"device": job})
    for _ in jobs:
        await ended.get()
    await there.execute("nbd-server-stop")
    await here.execute("migrate-continue", {"state": "pre-switchover"})
    await there.disconnect()
    await here.disconnect()


async def _mirror(here: QMPClient, there: QMPClient, socket: str, mode: str) -> list[str]:
    """Export the disks of one QEMU, and start to copy those of the other. Return the names of the jobs."""
    await there.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": socket}}})
    ours: Any = await here.execute("query-block")
    theirs: Any = await there.execute("query-block")
    names = [f"copy{number}" for number in range(len(ours))]
    for name, one, other in zip(names, ours, theirs, strict=True):
        node = other["inserted"]["node-name"]
        export: dict[str, object] = {"type": "nbd", "id": name, "node-name": node, "name": name, "writable": True}
        await there.execute("block-export-add", export)
        server = {"type": "unix", "path": socket}
        await here.execute("blockdev-add", {"driver": "nbd", "node-name": name, "server": server, "export": name})
        job: dict[str, object] = {"job-id": name, "device": one["inserted"]["node-name"], "target": name}
        await here.execute("blockdev-mirror", {**job, "sync": "full", "copy-mode": mode})
    return names
