"""Lets a stopped process run on when whoever stopped it dies: `python process_guardian.py PIDFD`.

A script in a session of its own, with nothing of pageferry imported. It waits for the end of its standard input. A line
on it means that the process needs no help any more.
"""

from __future__ import annotations

import contextlib
import signal
import sys


def main() -> None:
    """Wait for the end of the controller, then continue the process."""
    if not sys.stdin.readline():
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(int(sys.argv[1]), signal.SIGCONT)


if __name__ == "__main__":
    main()
