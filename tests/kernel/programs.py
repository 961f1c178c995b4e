"""Programs in separate processes that report line by line. Every wait has a timeout."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

DEADLINE = 30.0
"""Timeout in seconds, well above the duration of any step."""


class Program:
    """Process of `python ARGUMENTS` whose output is read line by line. The `with` statement kills it at the end.

    `within`: command prefix, which executes the rest of the command on another host or as another user.
    """

    def __init__(self, *arguments: str, within: Sequence[str] = (), **options: Any) -> None:
        command = [*within, sys.executable, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
        self._rest = b""

    def line(self) -> str:
        """Return the next line of output. Raises AssertionError after `DEADLINE` seconds, or if the program exits."""
        assert self.process.stdout is not None
        end = time.monotonic() + DEADLINE
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], end - time.monotonic())
            assert ready, f"no line from {self.process.args!r}"
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, f"{self.process.args!r} exited"
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()

    def json(self) -> Any:
        """Return the next line of output, decoded from JSON. Raises the same errors as `line`."""
        return json.loads(self.line())

    def say(self, line: str) -> None:
        """Write a line to the standard input of the program."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Kill the program with SIGKILL, and wait until it has exited."""
        self.process.kill()
        self.process.wait(DEADLINE)

    def wait(self) -> int:
        """Wait until the program exits, and return its exit code. Raises TimeoutExpired after `DEADLINE` seconds."""
        return self.process.wait(DEADLINE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def wait_until(condition: Any, what: str, deadline: float = DEADLINE) -> None:
    """Poll until `condition` returns true. Raises AssertionError after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.005)
