"""Tables and targets of the store benchmark."""

from __future__ import annotations

from benchmarks.harness.bench import Results
from benchmarks.harness.statistics import having, median, median_of
from benchmarks.harness.tables import Column, Run, Target, at_least, at_most, table
from benchmarks.store import encryption

REQUESTS: tuple[Column, ...] = (
    ("requests before the arena is usable", "requests", 0, 1),
    ("requests of the first access", "access-requests", 0, 1),
)
ARENA: tuple[Column, ...] = (
    ("usable ms", "open-ms", 0, 1),
    ("access ms", "access-us", 1, 1000),
    ("complete ms", "complete-ms", 0, 1),
    ("stored Mbit/s", "mbps", 0, 1),
    ("iperf3 Mbit/s", "iperf3-mbps", 0, 1),
)
ENCRYPTION: tuple[Column, ...] = (("ms", "s", 0, 0.001), ("CPU ms", "cpu-s", 0, 0.001))
GUEST: tuple[Column, ...] = (
    ("command to RESUME ms", "command-to-resume-ms", 0, 1),
    ("first tick ms", "first-tick-ms", 0, 1),
    ("TTR(1 s, 80 %) ms", "ttr-ms", 0, 1),
    ("faults on missing pages", "missed", 0, 1),
    ("MiB read", "bytes-read", 0, 1 << 20),
    ("complete ms", "complete-ms", 0, 1),
    ("iperf3 Mbit/s", "iperf3-mbps", 0, 1),
)
ROUND_TRIPS, ROUND_TRIP = 9, 20.0
"""Number of round trips that a restore on cold connections may add, and their duration, ms."""


def judge(results: Results) -> list[Target]:
    """Compare the figures with the targets."""
    targets = [
        at_most(f"dependent requests before the arena is usable, {run['image']}", run["requests"], 3, "", 0)
        for run in results.get("requests", [])
    ]
    if arenas := results.get("arenas", []):
        eager = having(arenas, method="store, eager")
        share = median([run["mbps"] / run["iperf3-mbps"] for run in eager])
        targets.append(at_least("eager restore of the arena, of the link", share, 0.8, "", 2))
        targets.append(_again("arena, second time, usable", arenas, "open-ms"))
        targets.append(_again("arena, second time, complete", arenas, "complete-ms"))
    if measured := results.get("encryption", []):
        cost = encryption.cost(measured, "eager restore", "s")
        targets.append(at_most("eager restore from a directory, encrypted, of unencrypted", cost, 1.15, "", 2))
    if guests := results.get("guests", []):
        local = median_of(having(guests, method="local"), "command-to-resume-ms")
        cold = median_of(having(guests, method="store"), "command-to-resume-ms")
        limit = ROUND_TRIPS * ROUND_TRIP + 1.5 * local
        targets.append(at_most("guest, command to RESUME, cold connections", cold, limit, "ms", 0))
        targets.append(_again("guest, second time, command to RESUME", guests, "command-to-resume-ms"))
        targets.append(_responsive(guests))
    return targets


def _again(what: str, runs: list[Run], key: str) -> Target:
    again = median_of(having(runs, method="store, second time"), key)
    return at_most(f"{what}, of local", again / median_of(having(runs, method="local"), key), 1.2, "", 2)


def _responsive(guests: list[Run]) -> Target:
    """Compare the time to responsiveness with the time that sending the working set once takes."""
    read = median_of(having(guests, method="store, no prefetch"), "bytes-read")
    rate = median_of(guests, "iperf3-mbps") * 1e6 / 8
    found = median_of(having(guests, method="store, working set"), "ttr-ms")
    return at_most("guest with a working set, TTR, of sending it once", found / (read / rate * 1e3), 2, "", 2)


def render(results: Results) -> list[str]:
    """Return headings and tables, alternating."""
    return [
        "### Requests",
        table(results.get("requests", []), ("image",), REQUESTS),
        "### Arena of 4 GiB, link of 20 ms and 1 Gbit/s",
        table(results.get("arenas", []), ("method",), ARENA),
        "### Encryption, arena of 512 MiB, directory on tmpfs",
        table(results.get("encryption", []), ("method",), ENCRYPTION),
        "### Guest with 860 MiB in use, link of 20 ms and 1 Gbit/s",
        table(results.get("guests", []), ("method",), GUEST),
    ]
