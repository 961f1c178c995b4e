"""QEMU's own migration over loopback: pre-copy on one connection, and multifd.

The benchmark sends the command itself, through a QMP session that is already open, or starts a script that opens its
own session through qemu.qmp.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.migrate.guest import Line, Place, Running
from benchmarks.migrate.pageferry_line import reap
from pageferry.workloads.arena.arena import memory_file

BANDWIDTH = 10 << 30
"""Bandwidth limit that is never reached, bytes per second."""
DEFAULT_BANDWIDTH = 128 << 20
"""Default of `max-bandwidth` since QEMU 5.2, bytes per second."""
DOWNTIME_LIMIT = 300
"""Downtime limit, milliseconds: the default of both QEMU and pageferry."""
CHANNELS = 2
SCRIPT = Path(__file__).with_name("script.py")


class QemuLine(Line):
    """Guest in QEMU without pageferry.

    `shared_file`: whether its memory is a shared file, as with pageferry, instead of anonymous memory.
    """

    may_be_lost = True

    def __init__(self, label: str, place: Place, qemu: Path, load: str, *, shared_file: bool = False) -> None:
        super().__init__(label, place, qemu, load)
        self.shared_file = shared_file
        self.multifd = False
        self.bandwidth = BANDWIDTH
        self._processes: list[subprocess.Popen[bytes]] = []
        self._address = ""
        self._script: subprocess.Popen[bytes] | None = None

    def command(self, number: int) -> list[str]:
        return [*super().command(number), "-qmp", f"unix:{self._script_path(number)},server=on,wait=off"]

    def start(self) -> None:
        self.launch(0, ())

    def prepare(self, number: int, options: dict[str, Any]) -> None:
        self.multifd = options.get("multifd", False)
        self.bandwidth = DEFAULT_BANDWIDTH if options.get("default") else BANDWIDTH
        self.launch(number, ("-incoming", "defer"))

    def accept(self, destination: Running) -> None:
        self.set_up(destination, {"multifd": self.multifd})
        destination.monitor.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        (listening,) = destination.monitor.execute("query-migrate")["socket-address"]
        self._address = f"tcp:127.0.0.1:{listening['port']}"

    def begin(self, source: Running, options: dict[str, Any]) -> None:
        if options.get("scripted"):
            settings = {"max-bandwidth": self.bandwidth, "downtime-limit": DOWNTIME_LIMIT, "multifd-channels": CHANNELS}
            words = (str(self._script_path(self.hops - 1)), self._address, json.dumps(settings))
            more = ("multifd",) if self.multifd else ()
            self._script = subprocess.Popen([sys.executable, "-P", str(SCRIPT), *words, *more])
            return
        self.set_up(source, {"multifd": self.multifd})
        source.monitor.execute("migrate", uri=self._address)

    def finish(self, source: Running, destination: Running) -> dict[str, Any]:
        source.monitor.wait("MIGRATION", status="completed")
        script, self._script = self._script, None
        agents = 0.0 if script is None else reap(script)
        told = source.monitor.execute("query-migrate")
        source.monitor.execute("quit")
        self._processes.pop(0).wait()
        return {
            "total-ms": told["total-time"],
            "downtime-ms": told["downtime"],
            "setup-ms": told["setup-time"],
            "transferred": told["ram"]["transferred"],
            "rounds": told["ram"]["dirty-sync-count"],
            "requests": told["ram"].get("postcopy-requests"),
            "agents-cpu-s": agents,
            "agents": int(script is not None),
        }

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _script_path(self, number: int) -> Path:
        return self.monitor_path(number).with_suffix(f".{number}s")

    def launch(self, number: int, more: tuple[str, ...]) -> None:
        """Start QEMU number `number` with additional options."""
        memory, inherited = _shared_memory(self.place.memory) if self.shared_file else ((), [])
        try:
            self._processes.append(subprocess.Popen([*self.command(number), *memory, *more], pass_fds=inherited))
        finally:
            for descriptor in inherited:
                os.close(descriptor)

    def set_up(self, running: Running, capabilities: dict[str, bool]) -> None:
        """Set capabilities and parameters of the next migration."""
        items = [{"capability": name, "state": state} for name, state in {"events": True, **capabilities}.items()]
        running.monitor.execute("migrate-set-capabilities", capabilities=items)
        running.monitor.execute(
            "migrate-set-parameters",
            max_bandwidth=self.bandwidth,
            downtime_limit=DOWNTIME_LIMIT,
            multifd_channels=CHANNELS,
        )


def _shared_memory(size: int) -> tuple[tuple[str, ...], list[int]]:
    file, _ = memory_file(size)
    backend = f"memory-backend-file,id=ram0,size={size},share=on,align=2M,mem-path=/proc/self/fd/{file}"
    return ("-object", backend, "-machine", "memory-backend=ram0"), [file]
