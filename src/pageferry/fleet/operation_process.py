"""Supervisor of an operation of a host's agent: `python operation_process.py FOLDER COMMAND`.

The supervisor runs the command (JSON) in a separate session, with its output in FOLDER. It records its end in
`FOLDER/ended.json`. It does not start the command once `FOLDER/cancelled` exists. It outlives the agent, Ray and the
driver: none of them can interrupt a migration by exiting. It uses only the standard library.

Ray lowers the priority of the processes of its actors: it raises their niceness, and makes the kernel's OOM killer
choose them first. It also blocks signals in them. Workloads must not inherit this, so the supervisor restores the
values of an ordinary process. It also removes the variables of Ray, which include the token of the cluster, from the
environment of the command.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

_CANCELLED = 25
"""Exit code of an operation that was cancelled before its command has started: that of `Cancelled`."""


def main() -> int:
    """Start the supervisor in the background, print its pid, and return."""
    folder, command = sys.argv[1], json.loads(sys.argv[2])
    pid = os.fork()
    if pid:
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        os._exit(0)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    _be_ordinary()
    _supervise(folder, command)
    return 0


def _be_ordinary() -> None:
    """Restore the signals, the scheduling priority and the OOM score of an ordinary process. The kernel may refuse the
    last two to an ordinary user."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")


def _supervise(folder: str, command: list[str]) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    out, err = (os.open(os.path.join(folder, name), flags, 0o600) for name in ("stdout", "stderr"))
    if os.path.exists(os.path.join(folder, "cancelled")):
        code = _CANCELLED
    else:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=kept)
        _write(folder, "running.json", {"pid": process.pid, "started": _start_time(process.pid)})
        code = process.wait()
    _write(folder, "ended.json", {"exit-code": code})


def _start_time(pid: int) -> int:
    """Return the start time of a child, which is not reaped yet, in the unit of proc(5)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def _write(folder: str, name: str, record: dict[str, int]) -> None:
    path = os.path.join(folder, name)
    with open(f"{path}.new", "w", encoding="ascii") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path)


if __name__ == "__main__":
    sys.exit(main())
