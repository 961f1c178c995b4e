"""Migration of the guest by `pageferry receive` and `pageferry migrate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import cpu_seconds
from benchmarks.migrate.guest import Line, Running

PAGEFERRY = Path(sys.executable).with_name("pageferry")
LISTEN = ("--listen", "127.0.0.1:0")
"""Options of receivers: TCP, as for QEMU's own migration."""
Process = subprocess.Popen[bytes]


def pageferry(*words: str, through: tuple[str, ...] = ()) -> Process:
    """Start a pageferry command that prints JSON lines on its standard output. `through`: command prefix."""
    return subprocess.Popen([*through, str(PAGEFERRY), *words], stdout=subprocess.PIPE)


def expect(process: Process, kind: str) -> dict[str, Any]:
    """Return the next event of this type. Raises RuntimeError if the command exits without one."""
    assert process.stdout is not None
    for line in process.stdout:
        said: dict[str, Any] = json.loads(line)
        if said["type"] == kind:
            return said
    raise RuntimeError(f"cannot run {process.args!r}: it exited with code {process.wait()}")


def reap(process: Process) -> float:
    """Wait for a process, and return its CPU time in seconds. Raises RuntimeError if it failed."""
    if process.stdout is not None:
        process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"cannot run {process.args!r}: it exited with code {process.returncode}")
    return usage.ru_utime + usage.ru_stime


class PageferryLine(Line):
    """Guest managed by pageferry.

    Options of a migration: `words` for `pageferry migrate`; `through`, a command prefix of the receiver.
    """

    def start(self) -> None:
        if pageferry("run", self.name(0), "--detach", "--", *self.command(0)).wait():
            raise RuntimeError(f"cannot start {self.name(0)}: pageferry run failed")

    def prepare(self, number: int, options: dict[str, Any]) -> None:
        words = ("receive", self.name(number), *LISTEN, "--detach", "--output", "json", "--", *self.command(number))
        self._receiver = pageferry(*words, through=options.get("through", ()))
        self._address = expect(self._receiver, "listening")["address"]

    def accept(self, destination: Running) -> None:
        self._receiver_cpu = cpu_seconds(self._receiver.pid) or 0.0

    def begin(self, source: Running, options: dict[str, Any]) -> None:
        words = ("migrate", self.name(self.hops - 1), self._address, "--output", "json", *options.get("words", ()))
        self._sender = pageferry(*words)

    def finish(self, source: Running, destination: Running) -> dict[str, Any]:
        told = expect(self._sender, "migration")
        agents = reap(self._sender) + reap(self._receiver) - self._receiver_cpu
        return {
            "total-ms": told["total-time"],
            "downtime-ms": told["downtime"],
            "setup-ms": told["setup-time"],
            "transferred": told["transferred"],
            "rounds": told["dirty-sync-count"],
            "agents-cpu-s": agents,
            "agents": 2,
            "downtime-parts": told["downtime-parts"],
            "populated": told["populated"],
            "fallbacks": told["large-pages"]["fallbacks"],
            "large-pages": told["large-pages"],
            "own-faults": told["faults-after-resume"],
            "requests": told["postcopy-requests"],
            "postcopy": told["postcopy"],
        }

    def end(self) -> None:
        for name in (self.name(self.hops), self.name(self.hops - 1)):
            subprocess.run([str(PAGEFERRY), "stop", name], check=False, capture_output=True)

    def name(self, number: int) -> str:
        """Return the name of the guest in QEMU number `number`."""
        return f"{self.stem}-{number}"
