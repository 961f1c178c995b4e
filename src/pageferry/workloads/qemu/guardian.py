"""Guardian of a QEMU guest: a small process that outlives the controller and executes its cleanup plan.

A controller that has paused a guest may be killed at any time, and the guest must then continue. The guardian is a
script (`python guardian.py QMP_SOCKET`) in a separate session, which imports nothing of pageferry. It reads plans from
its standard input, one JSON object per line; each replaces the one before. At the end of the input, when the controller
has closed it or has exited, the guardian executes the last plan: the QMP commands `commands`; or `otherwise`, if there
is a `witness` (path and text) and that file does not contain that text. An empty list changes nothing.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import IO, Any

TIMEOUT = 86400.0
"""Seconds to retry: QEMU does not reply while it waits for a disk, or while another client uses the monitor."""

_MIGRATING = frozenset({"setup", "active", "device", "pre-switchover", "cancelling"})


def main() -> None:
    """Wait for the end of the controller, then execute its plan."""
    will: dict[str, Any] = {"commands": []}
    for line in sys.stdin:
        if line.endswith("\n"):  # else the controller exited while writing: the previous plan holds
            will = json.loads(line)
    commands = _decided(will)
    deadline = time.monotonic() + TIMEOUT
    while commands and time.monotonic() < deadline:
        try:
            _carry_out(sys.argv[1], commands, deadline)
        except (ConnectionRefusedError, FileNotFoundError):  # QEMU has exited
            return
        except OSError:
            time.sleep(0.05)
        else:
            return


def _decided(will: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the commands to execute. Only the controller, which has exited, could have written the witness."""
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
            # The controller may have exited while it was saving the device state.
            while _execute(monitor, {"execute": "query-migrate"}).get("status") in _MIGRATING:
                _execute(monitor, {"execute": "migrate_cancel"})
                time.sleep(0.01)
            for command in commands:
                _execute(monitor, command)


def _execute(monitor: IO[str], command: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a command; an empty one if QEMU refuses the command: the guardian cannot report errors."""
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
