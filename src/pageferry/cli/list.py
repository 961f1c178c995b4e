"""`pageferry list`: list the workloads of this host."""

from __future__ import annotations

import argparse

import msgspec

from pageferry import report
from pageferry.cli.options import refuse
from pageferry.host.registry import Folder, Registry
from pageferry.migration.ownership import committed
from pageferry.report.reporter import open_reporter
from pageferry.workloads.events import BaseListing, Listing, WorkloadInfo
from pageferry.workloads.inventory import describe_all, describe_ended


async def run(args: argparse.Namespace) -> int:
    """Query all registered workloads concurrently, and print them."""
    registry = Registry()
    if args.bases:
        refuse(args, ("all",), "with --bases")
        return _list_bases(args, registry)
    found = [_with_reason(registry, info) for info in await describe_all(registry)]
    ended = describe_ended(registry) if args.all else []
    with open_reporter(args.output, lambda: report.WorkloadsView()) as reporter:
        if args.output == "human":
            reporter.final(Listing(found, ended))
        else:
            for info in [*found, *ended]:
                reporter.event(info)
    return 0


def _list_bases(args: argparse.Namespace, registry: Registry) -> int:
    from pageferry.workloads.bases import describe_bases

    found = describe_bases(registry)
    with open_reporter(args.output, lambda: report.WorkloadsView()) as reporter:
        if args.output == "human":
            reporter.final(BaseListing(found))
        else:
            for info in found:
                reporter.event(info)
    return 0


def _with_reason(registry: Registry, info: WorkloadInfo) -> WorkloadInfo:
    """Return `info`, with a reason added if the workload is paused by a migration whose outcome is unknown."""
    if info.status != "paused" or committed(Folder(registry, info.name)) is None:
        return info
    reason = f"committed by a migration whose outcome is unknown; run `pageferry migrate {info.name} --recover`"
    return msgspec.structs.replace(info, reason=reason)
