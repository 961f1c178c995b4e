"""Huge pages of running workloads and processes (S3): measure how much of each is used, and reclaim cold memory.

::

    with pageferry.large_pages.open_target("pid:4711") as target:
        found = pageferry.large_pages.sample(target, pageferry.large_pages.Options(sample=0.1))
        print(found.estimate.idle)
"""

from typing import TYPE_CHECKING

from pageferry.lazy import lazily

if TYPE_CHECKING:
    from pageferry.large_pages.api import sample, sample_async, undo, undo_async
    from pageferry.large_pages.events import BroughtBack, LargePagesResult
    from pageferry.large_pages.options import Options
    from pageferry.large_pages.policy import Decision, Facts, Policy, Threshold
    from pageferry.workloads.target import Target, open_target, open_target_async, process_target, workload_target

__all__ = [
    "BroughtBack",
    "Decision",
    "Facts",
    "LargePagesResult",
    "Options",
    "Policy",
    "Target",
    "Threshold",
    "open_target",
    "open_target_async",
    "process_target",
    "sample",
    "sample_async",
    "undo",
    "undo_async",
    "workload_target",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "BroughtBack": "pageferry.large_pages.events",
        "Decision": "pageferry.large_pages.policy",
        "Facts": "pageferry.large_pages.policy",
        "LargePagesResult": "pageferry.large_pages.events",
        "Options": "pageferry.large_pages.options",
        "Policy": "pageferry.large_pages.policy",
        "Target": "pageferry.workloads.target",
        "Threshold": "pageferry.large_pages.policy",
        "open_target": "pageferry.workloads.target",
        "open_target_async": "pageferry.workloads.target",
        "process_target": "pageferry.workloads.target",
        "sample": "pageferry.large_pages.api",
        "sample_async": "pageferry.large_pages.api",
        "undo": "pageferry.large_pages.api",
        "undo_async": "pageferry.large_pages.api",
        "workload_target": "pageferry.workloads.target",
    },
)
