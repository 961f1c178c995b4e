"""Migration of the built-in workload with given options, on one host or between two, and its statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.ballast import Ballast
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.pageferry_line import Process, expect, pageferry, reap


@dataclass(frozen=True, slots=True)
class Ends:
    """Command prefixes (`here`, `there`) and further arguments of source and destination."""

    here: tuple[str, ...] = ()
    there: tuple[str, ...] = ()
    sending: tuple[str, ...] = ()
    receiving: tuple[str, ...] = ()


def move(ledger: Ledger, ballast: Ballast, words: tuple[str, ...], ends: Ends = Ends()) -> dict[str, Any]:
    """Migrate the workload once, terminate the previous process, and return the figures."""
    ledger.prepare(ends.there, ends.receiving)
    ballast.hold()
    ballast.release()
    sender = begin(ledger, words, ends)
    first = None if "postcopy" in words else expect(sender, "round")
    run = summary(expect(sender, "migration"), first)
    reap(sender)
    ledger.moved()
    return run


def begin(ledger: Ledger, words: tuple[str, ...], ends: Ends = Ends()) -> Process:
    """Start the migration to the destination that `Ledger.prepare` has started. Return the process of the command."""
    command = ("migrate", ledger.name, ledger.address, "--output", "json", *ends.sending, *words)
    return pageferry(*command, through=ends.here)


def summary(told: dict[str, Any], first_round: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the figures of a migration for tables. `first_round`: event of the first round; None if there was none."""
    late = told["postcopy"] or {}
    waits = late.get("waits") or {}
    return {
        "total-ms": told["total-time"],
        "downtime-ms": told["downtime"],
        "transferred": told["transferred"],
        "mbps": told["mbps"],
        "first-round-mbps": first_round["mbps"] if first_round else None,
        "rounds": told["dirty-sync-count"],
        "requests": told["postcopy-requests"],
        "late-ms": late.get("time"),
        "late-pages": late.get("pages"),
        "p50-us": waits.get("p50-us"),
        "p99-us": waits.get("p99-us"),
        "longest-us": waits.get("longest-us"),
    }


def failure(sender: Process) -> dict[str, Any]:
    """Wait for a migration that is expected to fail. Return its exit code, number of rounds and last event."""
    assert sender.stdout is not None
    lines = [json.loads(line) for line in sender.stdout]
    sender.stdout.close()
    return {"exit-code": sender.wait(), "rounds": sum(line["type"] == "round" for line in lines), "last": lines[-1:]}
