"""Tables and targets of the fleet benchmark."""

from __future__ import annotations

from benchmarks.harness.bench import Results
from benchmarks.harness.statistics import having, median_of
from benchmarks.harness.tables import Column, Target, at_least, at_most, table

GIB = float(1 << 30)
PLANS: tuple[Column, ...] = (
    ("hosts", "hosts", 0, 1),
    ("workloads moved", "workloads", 0, 1),
    ("without a place", "unplaced", 0, 1),
    ("CPU s", "cpu-s", 2, 1),
    ("peak memory MiB", "memory", 0, 1 << 20),
    ("duration s", "makespan-s", 1, 1),
    ("lower bound s", "bound-s", 1, 1),
    ("duration / bound", "of-bound", 2, 1),
    ("GiB", "bytes", 0, GIB),
)
EVACUATIONS: tuple[Column, ...] = (
    ("duration s", "seconds", 1, 1),
    ("planned s", "plan-s", 1, 1),
    ("lower bound s", "bound-s", 1, 1),
    ("moved", "moved", 0, 1),
    ("stayed", "stayed", 0, 1),
    ("stuck", "stuck", 0, 1),
    ("starts", "starts", 0, 1),
    ("failed starts", "failed-starts", 0, 1),
    ("GiB", "bytes", 0, GIB),
    ("peak of a host %", "peak-host", 0, 0.01),
    ("peak of an uplink %", "peak-uplink", 0, 0.01),
    ("downtime, median ms", "downtime-p50-ms", 0, 1),
    ("99 % ms", "downtime-p99-ms", 0, 1),
    ("longest ms", "downtime-longest-ms", 0, 1),
    ("execution, CPU s", "control-cpu-s", 2, 1),
)
PLAN_CPU = 10.0
"""Maximum CPU time of the plan for a row, seconds."""
OF_BOUND = 1.3
"""Maximum duration, relative to the lower bound."""


def render(results: Results) -> list[str]:
    """Return headings and tables."""
    return [
        "### Plans for 10,000 hosts and 200,000 workloads",
        table(results["plans"], ("plan",), PLANS),
        "### Simulated evacuations",
        table(results["evacuations"], ("area", "method"), EVACUATIONS),
    ]


def judge(results: Results) -> list[Target]:
    """Return all targets."""
    row = having(results["plans"], plan="evacuate a row")
    simulated = having(results["evacuations"], area="row")
    ours, naive = (having(simulated, method=method) for method in ("planner", "first-fit"))
    bound = median_of(ours, "bound-s")
    return [
        at_most("plan for the evacuation of a row: CPU time", median_of(row, "cpu-s"), PLAN_CPU, "s", 1),
        at_most("the same plan: duration, relative to the lower bound", median_of(row, "of-bound"), OF_BOUND, "", 2),
        at_most(
            "simulated evacuation of a row: duration, relative to the lower bound",
            median_of(ours, "seconds") / bound,
            OF_BOUND,
            "",
            2,
        ),
        at_least(
            "first-fit: duration, relative to the planner",
            median_of(naive, "seconds") / median_of(ours, "seconds"),
            1,
            "",
            1,
        ),
    ]
