"""Guardian that ends a CPU time limit when the process that has set it exits: `python cpu_quota_guardian.py UNDO`.

A script in a separate session that imports nothing of pageferry. It waits for the end of its standard input, and then
undoes the limit as UNDO (JSON) specifies: it moves all processes of `group` to `parent` and removes the group, or
writes `text` to `file`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time

ATTEMPTS = 200


def main() -> None:
    """Wait for the end of standard input, then undo the limit."""
    sys.stdin.read()
    undo = json.loads(sys.argv[1])
    with contextlib.suppress(FileNotFoundError):  # never created, or already removed
        if "file" in undo:
            _write(undo["file"], undo["text"])
        else:
            _empty(undo["group"], undo["parent"])


def _empty(group: str, parent: str) -> None:
    _write(os.path.join(group, "cpu.cfs_quota_us"), "-1")
    for _ in range(ATTEMPTS):  # a process may fork during the move, or be exiting
        with open(os.path.join(group, "cgroup.procs"), encoding="ascii") as file:
            pids = file.read().split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                _write(os.path.join(parent, "cgroup.procs"), pid)
        with contextlib.suppress(OSError):
            os.rmdir(group)
            return
        time.sleep(0.01)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
