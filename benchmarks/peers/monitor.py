"""QMP session with a QEMU of any version: commands, and events with QEMU's time stamps."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any


class Monitor:
    """QMP session. The constructor waits until the socket exists."""

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self._rest = b""
        self._events: list[dict[str, Any]] = []
        self.history: list[tuple[str, float]] = []
        """All events received, with their times in seconds since 1970.

        `wait` does not remove events from this list.
        """
        self._next(deadline)
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its result. Raises RuntimeError with QEMU's error."""
        words = {"execute": command, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        self._socket.sendall(json.dumps(words).encode())
        while True:
            answer = self._next(time.monotonic() + 60)
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            self._events.append(answer)

    def wait(self, event: str, timeout: float = 60.0, **data: Any) -> float:
        """Wait for the next event with this name and data, and discard earlier events.

        Return the time of the event, seconds since 1970.
        """
        deadline = time.monotonic() + timeout
        while True:
            said = self._events.pop(0) if self._events else self._next(deadline)
            if said.get("event") == event and data.items() <= said.get("data", {}).items():
                return _time(said)

    def threads(self) -> list[int]:
        """Return the thread ids of the vCPUs."""
        return [cpu["thread-id"] for cpu in self.execute("query-cpus-fast")]

    def pid(self) -> int:
        """Return the pid of QEMU, even if QEMU was started through another program."""
        status = Path(f"/proc/{self.threads()[0]}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("Tgid:")))

    def close(self) -> None:
        """Close the session."""
        self._socket.close()

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._rest:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._socket.recv(65536)
            if not data:
                raise EOFError("cannot read from the monitor: QEMU has closed it")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        if "event" in said:
            self.history.append((said["event"], _time(said)))
        return said


def _time(event: dict[str, Any]) -> float:
    return float(event["timestamp"]["seconds"]) + float(event["timestamp"]["microseconds"]) / 1e6
