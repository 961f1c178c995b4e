"""`pageferry stop`: stop a workload."""

from __future__ import annotations

import argparse

from pageferry.control.stopping import stop_async


async def run(args: argparse.Namespace) -> int:
    """Stop the workload, and remove its entry from the registry."""
    await stop_async(args.name, kill=args.kill)
    return 0
