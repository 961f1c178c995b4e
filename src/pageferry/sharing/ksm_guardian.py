"""Guardian of KSM's settings: restores them when the process that changed them has finished or exited.

Started by `host.python`. Arguments: the directory of the settings, and their values as JSON. Writes `ready`, and acts
when its standard input ends.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from pageferry.sharing.ksm import undo_order


def main() -> int:
    """Wait, restore the settings, and return 0 if all could be restored."""
    folder, switches = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Signals of a terminal or service manager to its process group must not end this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    failed = 0
    for name, value in undo_order(switches):
        try:
            (folder / name).write_text(value)
        except OSError:
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
