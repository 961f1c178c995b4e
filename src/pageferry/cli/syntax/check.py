"""Arguments of `pageferry check`."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Test every kernel feature that pageferry uses, on private memory. Print the features that this user can use, "
        "the mechanism that each system will use, and a remedy for each missing feature. No setting of the host is "
        "changed. The exit code is 0 if live migration can run on this host, including that of guests if a QEMU is in "
        "PATH; otherwise it is 3. With --store, check an object store instead of the host."
    )
    parser.add_argument(
        "--store",
        metavar="URL",
        help="check whether the credentials in the environment permit what images need in this store, with one small "
        "object that is deleted again; exit code 34 if they do not (see docs/stores.md)",
    )
