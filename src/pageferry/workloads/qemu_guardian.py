"""The guardian: a small process that outlives a controller of a QEMU guest and carries out its last will.

A controller that has paused a guest may be killed at any moment, and the guest must run on then. So the guardian,
started as a script (`python qemu_guardian.py QMP_SOCKET`, with nothing of pageferry imported, in a session of its own),
reads wills from its standard input, one JSON list of QMP commands a line, the last one holding. When the input ends,
because the controller has closed it or has died, it carries the will out; an empty one leaves everything as it is.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import IO, Any

PATIENCE = 60.0
"""Seconds to try for: the monitor may still be busy with whoever has it."""

_MIGRATING = frozenset({"setup", "active", "device", "pre-switchover", "cancelling"})


def main() -> None:
    """Wait for the end of the controller, then do what it wanted."""
    will: list[dict[str, Any]] = []
    for line in sys.stdin:
        if line.endswith("\n"):  # else it died while it wrote: the will before holds
            will = json.loads(line)
    deadline = time.monotonic() + PATIENCE
    while will and time.monotonic() < deadline:
        try:
            _carry_out(sys.argv[1], will, deadline)
        except (ConnectionRefusedError, FileNotFoundError):  # QEMU is gone
            return
        except OSError:
            time.sleep(0.05)
        else:
            return


def _carry_out(path: str, will: list[dict[str, Any]], deadline: float) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(max(deadline - time.monotonic(), 0.1))
        connection.connect(path)
        with connection.makefile("rw") as monitor:
            _answer(monitor)  # the greeting
            _execute(monitor, {"execute": "qmp_capabilities"})
            # The controller may have died in the middle of saving the device state.
            while _execute(monitor, {"execute": "query-migrate"}).get("status") in _MIGRATING:
                _execute(monitor, {"execute": "migrate_cancel"})
                time.sleep(0.01)
            for command in will:
                _execute(monitor, command)


def _execute(monitor: IO[str], command: dict[str, Any]) -> dict[str, Any]:
    """What a command returns. One that QEMU refuses returns nothing: there is nobody to tell."""
    monitor.write(json.dumps(command) + "\n")
    monitor.flush()
    answer = _answer(monitor)
    while "event" in answer:
        answer = _answer(monitor)
    returned = answer.get("return")
    return returned if isinstance(returned, dict) else {}


def _answer(monitor: IO[str]) -> dict[str, Any]:
    line = monitor.readline()
    if not line:
        raise ConnectionResetError("the monitor hung up")
    answer: dict[str, Any] = json.loads(line)
    return answer


if __name__ == "__main__":
    main()
