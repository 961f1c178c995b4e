"""The guardian: a small process that outlives a controller of a QEMU guest and carries out its last will.

A controller that has paused a guest may be killed at any moment, and the guest must run on then. So the guardian,
started as a script (`python guardian.py QMP_SOCKET`, with nothing of pageferry imported, in a session of its own),
reads wills from its standard input, one JSON object a line, the last one holding. When the input ends, because the
controller has closed it or has died, it carries the will out: the QMP commands `commands`; or `otherwise`, where there
is a `witness` (path and text) and that file does not hold that text. An empty list leaves everything as it is.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import IO, Any

TIMEOUT = 86400.0
"""Seconds to try for: QEMU does not answer while it waits for a disk, or another client has the monitor."""

_MIGRATING = frozenset({"setup", "active", "device", "pre-switchover", "cancelling"})


def main() -> None:
    """Wait for the end of the controller, then do what it wanted."""
    will: dict[str, Any] = {"commands": []}
    for line in sys.stdin:
        if line.endswith("\n"):  # else it died while it wrote: the will before holds
            will = json.loads(line)
    commands = _decided(will)
    deadline = time.monotonic() + TIMEOUT
    while commands and time.monotonic() < deadline:
        try:
            _carry_out(sys.argv[1], commands, deadline)
        except (ConnectionRefusedError, FileNotFoundError):  # QEMU is gone
            return
        except OSError:
            time.sleep(0.05)
        else:
            return


def _decided(will: dict[str, Any]) -> list[dict[str, Any]]:
    """What is to be done: nobody but the controller could have written what the witness says, and it is gone."""
    commands: list[dict[str, Any]] = will["commands"]
    if "witness" in will:
        path, says = will["witness"]
        try:
            with open(path, encoding="utf-8") as file:
                holds = file.read() == says
        except OSError:
            holds = False
        if not holds:
            commands = will["otherwise"]
    return commands


def _carry_out(path: str, commands: list[dict[str, Any]], deadline: float) -> None:
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
            for command in commands:
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
        raise ConnectionResetError("QEMU closed the monitor")
    answer: dict[str, Any] = json.loads(line)
    return answer


if __name__ == "__main__":
    main()
