"""Guardian process: executes a plan when the process that started it exits. `python guardian_process.py PURPOSE`.

The script runs in a separate session, and uses only the standard library, so that it starts within milliseconds. It
writes a line when it is ready, then reads plans from its standard input, one JSON list of actions per line. Each plan
replaces the previous one. At the end of the input, when the parent has closed the pipe or exited, the guardian executes
the last plan. `host.guardian` defines the actions. The exit code is 0 if all actions succeeded. PURPOSE is only shown
by ps(1).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import IO, Any

TIMEOUT = 86400.0
"""Seconds to retry QMP commands: QEMU does not reply while it waits for a disk, or while another client uses the
monitor."""
PUT_TIMEOUT = 10.0
"""Seconds to retry a PUT request."""
ATTEMPTS = 200
"""Maximum number of attempts to empty a control group, one every 10 ms."""

_MIGRATING = frozenset({"setup", "active", "device", "pre-switchover", "cancelling"})

Action = dict[str, Any]

_NUMBERS = itertools.count(1)
"""Ids of QMP commands."""


def main() -> int:
    """Wait until the parent closes the pipe or exits, then execute its plan. Return the exit code."""
    # Signals of a terminal or service manager to its process group must not end this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # the parent has exited
        os.write(1, b"ready\n")
    plan: list[Action] = []
    for line in sys.stdin:
        if line.endswith("\n"):  # otherwise the parent exited while writing: the previous plan remains
            plan = json.loads(line)
    return 0 if _execute(plan) else 1


def _execute(plan: list[Action]) -> bool:
    """Execute all actions, even if one of them fails. Return whether all succeeded."""
    succeeded = True
    for action in plan:
        try:
            _ACTIONS[action["do"]](action)
        except OSError:
            succeeded = False
    return succeeded


def _write_file(action: Action) -> None:
    _write(action["file"], action["text"])


def _empty_group(action: Action) -> None:
    """Move the processes of a control group (v1) to its parent, and remove the group."""
    group = action["group"]
    with contextlib.suppress(FileNotFoundError):  # never created, or already removed
        _write(os.path.join(group, "cpu.cfs_quota_us"), "-1")
        for _ in range(ATTEMPTS):  # a process may fork during the move, or be exiting
            with open(os.path.join(group, "cgroup.procs"), encoding="ascii") as file:
                pids = file.read().split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    _write(os.path.join(action["parent"], "cgroup.procs"), pid)
            with contextlib.suppress(OSError):
                os.rmdir(group)
                return
            time.sleep(0.01)


def _send_signal(action: Action) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(action["pidfd"], action["number"])


def _decide_by_file(action: Action) -> None:
    """Execute one of two plans, depending on whether a file has the given contents. Only the parent writes these
    contents, and it has exited, so the result is final."""
    try:
        with open(action["file"], encoding="utf-8") as file:
            holds = file.read() == action["contents"]
    except OSError:
        holds = False
    _execute(action["then"] if holds else action["otherwise"])


def _run_monitor_commands(action: Action) -> None:
    """Execute QMP commands, as soon as QEMU replies."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            _converse(action, deadline)
            return
        except (ConnectionRefusedError, FileNotFoundError):  # QEMU has exited
            return
        except OSError:
            time.sleep(0.05)


def _put(action: Action) -> None:
    """Send the request until the server accepts it or has exited: the server may refuse it at first."""
    deadline = time.monotonic() + PUT_TIMEOUT
    while time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PUT_TIMEOUT)
            connection.connect(action["socket"])
            connection.sendall(f"PUT {action['path']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            if connection.recv(64).split()[1:2] in ([b"200"], [b"204"]):
                return
        time.sleep(0.01)


def _remove_files(action: Action) -> None:
    for path in action["files"]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _converse(action: Action, deadline: float) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(max(deadline - time.monotonic(), 0.1))
        connection.connect(action["socket"])
        with connection.makefile("rw") as monitor:
            _await_message(monitor, lambda message: "QMP" in message)  # the greeting
            _command(monitor, {"execute": "qmp_capabilities"})
            # The parent may have exited while it was saving the device state.
            while (status := _command(monitor, {"execute": "query-migrate"}).get("status")) in _MIGRATING:
                # Do not cancel in an earlier state: QEMU 7.2 blocks forever after a cancel just before
                # `pre-switchover`.
                if status == "pre-switchover":
                    _command(monitor, {"execute": "migrate_cancel"})
                time.sleep(0.01)
            for command in action["commands"]:
                _command(monitor, command)
            for job in action["jobs"]:
                _end_job(monitor, job, deadline)


def _end_job(monitor: IO[str], name: str, deadline: float) -> None:
    """End a block job, and remove its target. The parent has closed the connection of a mirror by exiting."""
    while time.monotonic() < deadline:
        jobs: list[dict[str, Any]] = _reply(monitor, {"execute": "query-jobs"}).get("return", [])
        states = [job["status"] for job in jobs if job["id"] == name]
        if not states:
            break
        command = "job-dismiss" if states == ["concluded"] else "job-cancel"
        _command(monitor, {"execute": command, "arguments": {"id": name}})
        time.sleep(0.01)
    _command(monitor, {"execute": "blockdev-del", "arguments": {"node-name": name}})


def _command(monitor: IO[str], command: dict[str, Any]) -> dict[str, Any]:
    """Execute a command. Return its result, which is empty if QEMU refuses the command: the guardian cannot report
    errors."""
    returned = _reply(monitor, command).get("return")
    return returned if isinstance(returned, dict) else {}


def _reply(monitor: IO[str], command: dict[str, Any]) -> dict[str, Any]:
    """Execute a command, and return the reply.

    QEMU can also send, on this connection, the reply to a command of a previous connection that was closed too early,
    such as a `stop` that waits for a disk. Such a reply has another id.
    """
    number = next(_NUMBERS)
    monitor.write(json.dumps({**command, "id": number}) + "\n")
    monitor.flush()
    return _await_message(monitor, lambda message: message.get("id") == number)


def _await_message(monitor: IO[str], expected: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the next message that is expected. Ignore all others."""
    while line := monitor.readline():
        message: dict[str, Any] = json.loads(line)
        if expected(message):
            return message
    raise ConnectionResetError("cannot read from the monitor: QEMU closed it")


def _write(path: str, text: str) -> None:
    """Write a text with one write(2), as files of control groups require."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


_ACTIONS = {
    "write": _write_file,
    "empty-group": _empty_group,
    "signal": _send_signal,
    "decide": _decide_by_file,
    "qmp": _run_monitor_commands,
    "remove": _remove_files,
    "put": _put,
}


if __name__ == "__main__":
    sys.exit(main())
