"""Puts the switches of KSM back when whoever set them is done, or dead.

Started by `host.python`. Arguments: the folder of the switches, and their values as JSON. Says `ready`, and acts when
its standard input ends.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from pageferry.sharing.ksm import undo_order


def main() -> int:
    """Wait, put back, and say by the exit code whether it worked."""
    folder, switches = Path(sys.argv[1]), json.loads(sys.argv[2])
    # A terminal or a service manager that ends its group does not mean us.
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
