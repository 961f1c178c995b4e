"""Arguments of `pageferry check`."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Set the description; the verb has no arguments."""
    parser.description = (
        "Test every kernel feature that pageferry uses, on private memory. Print the features that this user can use, "
        "the mechanism that each system will use, and a remedy for each missing feature. No setting of the host is "
        "changed. The exit code is 0 if live migration can run on this host, including that of guests if a QEMU is in "
        "PATH; otherwise it is 3."
    )
