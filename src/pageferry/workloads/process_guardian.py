"""Guardian of a stopped process: continues it when its controller exits. `python process_guardian.py PIDFD`.

The guardian is a script in a separate session, which imports nothing of pageferry. It waits for the end of its standard
input. A line on its standard input means that the process no longer needs the guardian.
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
