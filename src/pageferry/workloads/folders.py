"""Where the durable records of a workload go."""

from __future__ import annotations

from pageferry.errors import UsageError, WorkloadError
from pageferry.host.registry import Folder, Registry
from pageferry.workloads.lifecycle import LocalWorkload
from pageferry.workloads.protocols import Workload


def folder_of(workload: Workload) -> Folder | None:
    """The folder of a registered workload; None for one without a name on this host."""
    if isinstance(workload, LocalWorkload) and not workload.registered:
        return None
    try:
        registry = Registry()
        entry = registry.lookup(workload.name)
    except (UsageError, WorkloadError):
        return None
    # A workload without a name here may be called like another one that has it.
    pids = {segment.pid for region in workload.regions for segment in region.segments}
    return Folder(registry, workload.name) if entry.pid in pids else None
