"""Arguments of `pageferry monitor`."""

from __future__ import annotations

import argparse

TAKES_COMMAND = True


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Execute commands of QEMU's monitor: COMMAND, or the lines of standard input, with line editing on a terminal. "
        "Each command has a separate session of the monitor, so that other pageferry commands can use the monitor "
        "in between. A script ends at the first error; QEMU reports errors of HMP commands in their output only. "
        "`quit` ends the guest; Ctrl-D leaves the monitor."
    )
    parser.add_argument("name", metavar="NAME", help="guest (see `pageferry list`)")
    parser.add_argument(
        "words",
        metavar="COMMAND",
        nargs="*",
        help="command with its arguments, such as info status (after -- if an argument begins with a hyphen)",
    )
    parser.add_argument(
        "--qmp",
        action="store_true",
        help="execute QMP commands instead of HMP: a name such as query-status, or a JSON object with execute",
    )
