"""Built-in workload that migrates from process to process. Each process checks for lost writes when it exits."""

from __future__ import annotations

import json
import os
import subprocess
from types import TracebackType
from typing import Any, Self

from benchmarks.migrate.pageferry_line import LISTEN, Process, expect, pageferry
from pageferry.host.python import start_python


class Ledger:
    """Ledger in a separate process that can be migrated.

    `options`: fields of `LedgerOptions`; `setup`: fields of `Setup`.
    """

    def __init__(self, stem: str, size: int, options: dict[str, Any], **setup: Any) -> None:
        self._stem = f"{stem}-{os.getpid()}"
        self._number = 0
        self.address = ""
        self._next: Process | None = None
        words = json.dumps({"name": self.name, "size": size, "options": options, **setup})
        self._owner: Process = start_python(
            "pageferry.demo.process", words, stdout=subprocess.PIPE, start_new_session=True
        )
        expect(self._owner, "ready")

    @property
    def name(self) -> str:
        """Name of the workload in its current process."""
        return f"{self._stem}-{self._number}"

    @property
    def pid(self) -> int:
        """Pid of the current process."""
        return self._owner.pid

    @property
    def next_name(self) -> str:
        """Name of the workload in the next process."""
        return f"{self._stem}-{self._number + 1}"

    def prepare(self, through: tuple[str, ...] = (), words: tuple[str, ...] = ()) -> None:
        """Start the destination process. `through`: command prefix; `words`: further arguments."""
        receive = ("receive", self.next_name, *LISTEN, "--workload", "demo", "--output", "json", *words)
        self._next = pageferry(*receive, through=through)
        self.address = expect(self._next, "listening")["address"]

    def arrives(self) -> None:
        """Wait until the workload runs in the next process."""
        assert self._next is not None
        expect(self._next, "received")

    def stays(self) -> None:
        """Kill the next process after a failed migration."""
        assert self._next is not None
        self._next.kill()
        self._next.wait()
        self._next = None

    def moved(self) -> None:
        """Terminate the previous process after a migration. Raises RuntimeError if writes were lost."""
        assert self._next is not None
        self._end()
        self._owner, self._next = self._next, None
        self._number += 1

    def _end(self) -> None:
        self._owner.terminate()
        said = expect(self._owner, "ledger")
        assert self._owner.stdout is not None
        self._owner.stdout.close()
        self._owner.wait()
        if not said["intact"]:
            raise RuntimeError(f"cannot measure {self.name}: the ledger has lost writes: {said}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end()
        for process in (self._owner, self._next):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
