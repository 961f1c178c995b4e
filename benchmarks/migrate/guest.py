"""Migration of a guest between QEMU processes, and the figures measured for each migration.

A *line* is a guest together with a method of migration. The guest is booted once and then migrated repeatedly, each
time to a new QEMU. Between migrations the guest is paused, so that it does not compete with the guests of other lines.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.harness.processes import Meter, faults, large_mappings
from benchmarks.harness.serial import SerialLines
from benchmarks.peers.monitor import Monitor
from tests.guest import initrd, payload

MEMORY, SMALL_MEMORY = 1 << 30, 256 << 20
"""Memory of a guest, bytes; the second value is for --quick."""
SETTLING = 0.7
"""Seconds that a guest runs before it is migrated."""
WATCHED = 1.0
"""Period after a migration in which faults are counted, seconds."""
FIRST_WRITES = 1000
"""Number of pages that a guest under load writes in half a second."""

BUSY = "ferry.mib=200 ferry.rate=2000 ferry.tick=10"
"""Options of the checker: 200 MiB of pages that are verified continuously, of which 2000 are written per second."""
IDLE = "ferry.mib=200 ferry.rate=0 ferry.verify=0 ferry.tick=10"
PAYLOAD_BUSY = "ferry.mib=200 ferry.writes=8"
"""Options of the payload: 200 MiB of pages that are verified continuously, of which 8 are written per sweep."""
PAYLOAD_IDLE = "ferry.mib=200 ferry.writes=0"
"""As `PAYLOAD_BUSY`, without writes. The payload has no option to disable verification."""


@dataclass(frozen=True, slots=True)
class Place:
    """Directory, files and accelerator of the guests."""

    folder: Path
    kernel: Path
    initrd: Path | None
    """None for the payload, which has no operating system."""
    accel: str = "tcg"
    memory: int = MEMORY

    @classmethod
    def of_payload(cls, setting: Setting, accel: str = "tcg") -> Place:
        """Return the place of guests that run the payload, which boots within a second."""
        kernel = payload.build(machine.CHECKER.with_name("payload"))
        return replace(cls.of_checker(setting), kernel=kernel, initrd=None, accel=accel)

    @property
    def reserve(self) -> int:
        """Size of the ballast, bytes: a fully allocated guest, and a quarter more."""
        return self.memory * 5 // 4

    @classmethod
    def of_checker(cls, setting: Setting) -> Place:
        """Return the place of guests that run the checker."""
        memory = SMALL_MEMORY if setting.quick else MEMORY
        return cls(setting.folder, machine.KERNEL, initrd.build(machine.CHECKER), memory=memory)


@dataclass(slots=True)
class Running:
    """QEMU process that runs the guest, or waits to receive it."""

    monitor: Monitor
    pid: int
    threads: list[int]

    @classmethod
    def behind(cls, path: Path) -> Running:
        """Return the QEMU whose monitor has this path."""
        monitor = Monitor(path)
        return cls(monitor, monitor.pid(), monitor.threads())


class Line(ABC):
    """Guest together with a method of migration."""

    may_be_lost = False

    def __init__(self, label: str, place: Place, qemu: Path, load: str) -> None:
        self.label = label
        self.place = place
        self.qemu = qemu
        self.load = load
        self.stem = label.replace(" ", "-").replace(",", "")
        self.serial = SerialLines(place.folder / f"{self.stem}.serial")
        self.hops = 0
        self.under_way = (0.0, 0.0)
        """Start and end of the last migration, seconds on the monotonic clock."""
        self.current: Running | None = None

    def monitor_path(self, number: int) -> Path:
        """Return the path of the QMP socket that the benchmark uses for QEMU number `number`."""
        return self.place.folder / f"{self.stem}.{number}"

    def command(self, number: int) -> list[str]:
        """Return the command line of QEMU number `number`, without memory options."""
        initrd = () if self.place.initrd is None else ("-initrd", str(self.place.initrd))
        return [
            *(str(self.qemu), "-accel", self.place.accel),
            *("-m", f"{self.place.memory >> 20}M"),
            *"-smp 1 -nodefaults -display none".split(),
            *("-kernel", str(self.place.kernel), *initrd),
            *("-append", f"console=ttyS0 quiet {self.load}"),
            *("-serial", f"unix:{self.serial.path}"),
            *("-qmp", f"unix:{self.monitor_path(number)},server=on,wait=off"),
        ]

    def boot(self) -> None:
        """Start the guest. `serial.ready` is set when the guest has booted."""
        self.start()
        self.current = Running.behind(self.monitor_path(0))

    def rest(self) -> None:
        """Pause the guest until its next migration."""
        assert self.current is not None
        self.current.monitor.execute("stop")
        self.current.monitor.wait("STOP")

    def move(self, ballast: Ballast, **options: Any) -> dict[str, Any]:
        """Resume the guest, migrate it once, observe it for a second, and return the figures."""
        source = self.current
        assert source is not None
        source.monitor.execute("cont")
        source.monitor.wait("RESUME")
        self.hops += 1
        self.prepare(self.hops, options)
        destination = Running.behind(self.monitor_path(self.hops))
        self.accept(destination)
        time.sleep(SETTLING)
        run = self._measure(source, destination, ballast, options)
        source.monitor.close()
        self.current = destination
        ballast.hold()
        return run

    def _measure(
        self, source: Running, destination: Running, ballast: Ballast, options: dict[str, Any]
    ) -> dict[str, Any]:
        large = large_mappings(source.pid, self.place.memory)
        before = faults(destination.pid, destination.threads)
        meter = Meter([source.pid, destination.pid])
        clock = time.monotonic() - time.time()
        ballast.release()
        began = time.time()
        self.begin(source, options)
        stopped = source.monitor.wait("STOP")
        meter.read()
        resumed = destination.monitor.wait("RESUME")
        cpu = meter.read()
        time.sleep(max(resumed + WATCHED - time.time(), 0))
        run: dict[str, Any] = {
            "line": self.label,
            "alive-before": self.serial.speaks(began + clock - 0.5, began + clock),
            "elapsed-ms": (resumed - began) * 1e3,
            "stop-to-resume-ms": (resumed - stopped) * 1e3,
            "usual-silence-ms": self.serial.longest_silence(began + clock - 0.5, began + clock) * 1e3,
            "large-source": large,
            "large-destination": large_mappings(destination.pid, self.place.memory),
            "faults-first-second": faults(destination.pid, destination.threads) - before,
            "qemu-cpu-s": cpu,
        }
        run |= self.finish(source, destination)
        self.under_way = (began + clock, began + clock + run["total-ms"] / 1e3)
        # Until now, a guest in post-copy may have waited for pages.
        run["alive"] = self.serial.speaks(resumed + clock, time.monotonic(), WATCHED)
        run["silence-ms"] = self.serial.longest_silence(stopped + clock, resumed + clock) * 1e3
        run["first-writes-ms"] = _milliseconds(self.serial.time_to_writes(resumed + clock, FIRST_WRITES))
        run["cpu-s"] = run["qemu-cpu-s"] + run.get("agents-cpu-s", 0.0)
        self._look_after(run)
        return run

    def _look_after(self, run: dict[str, Any]) -> None:
        """Raise RuntimeError if the guest has found incorrect pages, or if pageferry has lost the guest.

        Only report a guest that QEMU has lost.
        """
        if self.serial.errors:
            raise RuntimeError(f"cannot measure {self.label}: the guest has found incorrect pages")
        if not run["alive"]:
            said = "; ".join(self.serial.words[-5:])
            if not self.may_be_lost:
                raise RuntimeError(f"cannot measure {self.label}: no output from the guest: {said}")
            when = "during" if run["alive-before"] else "before"
            print(
                f"{self.label}: the guest fell silent {when} migration {self.hops}, which is left out: {said}",
                file=sys.stderr,
            )

    @abstractmethod
    def start(self) -> None:
        """Start QEMU number 0, which boots the guest."""

    @abstractmethod
    def prepare(self, number: int, options: dict[str, Any]) -> None:
        """Start QEMU number `number`, which will receive the guest."""

    @abstractmethod
    def accept(self, destination: Running) -> None:
        """Make the destination listen, unless it already does."""

    @abstractmethod
    def begin(self, source: Running, options: dict[str, Any]) -> None:
        """Start the migration."""

    @abstractmethod
    def finish(self, source: Running, destination: Running) -> dict[str, Any]:
        """Wait until the migration is complete, and terminate the source. Return the statistics of the method."""

    @abstractmethod
    def end(self) -> None:
        """Terminate the guest and all of its processes."""


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
