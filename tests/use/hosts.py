"""Hosts on which commands of the documentation are run."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from pageferry.host import processes
from pageferry.host.registry import Registry

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 100.0
"""Timeout of one command, seconds."""
GUEST = "qemu-system-x86_64 -m 1G -accel kvm ..."


class Host:
    """Host, represented by a run directory and a working directory."""

    def __init__(self, folder: Path, path: str) -> None:
        self.folder = folder
        # The path of a socket has at most 107 bytes.
        self._short = tempfile.TemporaryDirectory(prefix="pageferry-", ignore_cleanup_errors=True)
        self.run_directory = Path(self._short.name) / "run"
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        self.environment = {
            **os.environ,
            "PATH": path,
            "PAGEFERRY_RUN_DIR": str(self.run_directory),
            "COLUMNS": "120",
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        }
        self.waiting: list[subprocess.Popen[str]] = []

    def run(self, command: str, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
        """Run a shell command to completion, in the working directory. Raises TimeoutExpired after `timeout`
        seconds."""
        return subprocess.run(
            ["sh", "-c", command],
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(self, command: str, announcement: str) -> subprocess.Popen[str]:
        """Start a command that keeps running. Return its process when its output matches the pattern `announcement`."""
        log = self.folder / f"log{len(self.waiting)}"
        with open(log, "w") as file:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"],
                cwd=self.work,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.waiting.append(process)
        deadline = time.monotonic() + TIMEOUT
        while not re.search(announcement, log.read_text()):
            assert process.poll() is None, f"{command} ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"{command} does not print {announcement!r}: {log.read_text()}"
            time.sleep(0.05)
        return process

    def has(self, name: str) -> bool:
        """Return whether a workload of this name exists."""
        return name in Registry(self.run_directory).entries()

    def provide(self, name: str) -> None:
        """Start a guest of this name if none exists. Pages of the documentation may assume that the guest exists."""
        if not self.has(name):
            done = self.run(f"pageferry run {name} --detach -- {GUEST}")
            assert done.returncode == 0, done.stderr

    def close(self) -> None:
        """Terminate all processes that were started on this host, and kill its workloads."""
        for process in self.waiting:
            process.terminate()
            process.wait(timeout=30)
        registry = Registry(self.run_directory)
        for name, entry in registry.entries().items():
            processes.send_signal(entry.pid, entry.started, signal.SIGKILL)
            asyncio.run(processes.wait_for_end(entry.pid, entry.started))
            registry.remove(name)
        self._short.cleanup()
