"""Directories for the persistent records of workloads."""

from __future__ import annotations

from pageferry.errors import UsageError, WorkloadError
from pageferry.host.registry import Folder, Registry
from pageferry.workloads.protocols import Live, placed_regions


def folder_of(workload: Live) -> Folder | None:
    """Return the directory of a registered workload; None for a workload that is not registered on this host."""
    if not workload.registered:
        return None
    try:
        registry = Registry()
        entry = registry.lookup(workload.name)
    except (UsageError, WorkloadError):
        return None
    # An unregistered workload may have the same name as a registered one.
    pids = {segment.pid for region in placed_regions(workload) for segment in region.segments}
    return Folder(registry, workload.name) if entry.pid in pids else None
