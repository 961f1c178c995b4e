"""Tables and targets of the clone benchmark."""

from __future__ import annotations

from benchmarks.harness.bench import Results
from benchmarks.harness.statistics import having, median_of
from benchmarks.harness.tables import Column, Target, at_most, table

GUESTS: tuple[Column, ...] = (
    ("all running ms", "all-running-ms", 0, 1),
    ("first running ms", "first-running-ms", 0, 1),
    ("PSS per guest MiB", "pss-per-guest", 1, 1 << 20),
    ("private per guest MiB", "private-per-guest", 1, 1 << 20),
)
SAVED: tuple[Column, ...] = (
    ("pause ms", "downtime-ms", 1, 1),
    ("private MiB", "private", 1, 1 << 20),
    ("bytes written MiB", "saved", 1, 1 << 20),
    ("bytes written / private bytes", "saved-of-private", 2, 1),
)
MOVED: tuple[Column, ...] = (
    ("until running ms", "running-ms", 0, 1),
    ("downtime ms", "downtime-ms", 1, 1),
    ("private MiB", "private", 1, 1 << 20),
    ("bytes sent MiB", "sent", 1, 1 << 20),
    ("bytes sent / private bytes", "sent-of-private", 2, 1),
)
SAVED_OF_PRIVATE = 1.1
"""Maximum size of the checkpoint of a clone, relative to the private memory of the clone."""
SENT_OF_PRIVATE = 1.2
"""Maximum size of the data that a migration of a clone to a host with its image sends, relative to the private memory
of the clone."""
TIME_OF_ALL = 0.25
"""Maximum duration of this migration, relative to a migration that sends all pages."""
SHARE = 0.5
"""Maximum PSS per guest with the largest number of clones, relative to guests with separate memory."""


def render(results: Results) -> list[str]:
    """Return headings and tables."""
    return [
        "### Guests of 1 GiB from one image",
        table(results["guests"], ("guests", "method"), GUESTS),
        "### Checkpoint of a clone",
        table(results["checkpoints"], ("mode",), SAVED),
        "### Migration of a clone at 1 Gbit/s",
        table(results["migrations"], ("method",), MOVED),
    ]


def judge(results: Results) -> list[Target]:
    """Return all targets."""
    most = max(run["guests"] for run in results["guests"])
    runs = having(results["guests"], guests=most)
    shared, own = (median_of(having(runs, method=method), "pss-per-guest") for method in ("shared", "own"))
    saved = median_of(results["checkpoints"], "saved-of-private")
    moved, everything = (having(results["migrations"], method=method) for method in ("shared", "all pages"))
    time = median_of(moved, "running-ms") / median_of(everything, "running-ms")
    sent = median_of(moved, "sent-of-private")
    return [
        at_most(f"memory of each of {most} guests, relative to separate memory", shared / own, SHARE, "", 2),
        at_most("checkpoint of a clone: bytes written / private bytes", saved, SAVED_OF_PRIVATE, "", 2),
        at_most("migration of a clone: bytes sent / private bytes", sent, SENT_OF_PRIVATE, "", 2),
        at_most("migration of a clone: duration, relative to one that sends all pages", time, TIME_OF_ALL, "", 2),
    ]
