"""Large pages of running workloads and processes (S3): which are hardly used, and reclaim of those.

::

    with await pageferry.large_pages.open_target("pid:4711") as target:
        found = await pageferry.large_pages.sample(target, Options(sample=0.1, window=0.2))
        print(found.estimate.idle)
"""

from pageferry.largepages.api import Options, sample, undo
from pageferry.largepages.events import BroughtBack, LargePagesResult
from pageferry.largepages.policy import Decision, Facts, Policy, Threshold
from pageferry.workloads.targets import Target, open_target, process_target, workload_target

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
    "process_target",
    "sample",
    "undo",
    "workload_target",
]
