"""Separate process for the built-in workload, started by `host.python` with the argument SETUP.

SETUP is a `Setup` as JSON. The process prints a line of JSON when the workload runs and can be migrated by its name.
After SIGTERM or SIGINT, or when the workload has been migrated, the process prints a last line with the result. Its
exit code is 0 if no write was lost::

    {"type": "ready", "name": "demo", "pid": 4711}
    {"type": "ledger", "reason": "stopped", "intact": true, "writes": 1234567, "checked": 65000, ...}
"""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
from typing import Any

import msgspec

from pageferry.demo.ledger import LedgerOptions, LedgerWorkload
from pageferry.errors import PageferryError, UsageError

LOOK = 0.2
"""Maximum time until a signal is noticed, seconds."""
FOUND = ("pages", "checked", "zeros", "lost", "stale", "misplaced", "torn", "overwritten", "writes", "disagreeing")


class Setup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Setup of the workload; see `LedgerWorkload.create`."""

    name: str
    size: int
    """Size of the arena, bytes."""
    options: LedgerOptions = LedgerOptions()
    processes: int = 1
    exact: bool = False
    large_pages: bool = True
    large_fraction: float | None = None


def run(setup: Setup) -> int:
    """Run the workload until a signal is received or it has been migrated. Return the exit code."""
    ends: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ends.put("stopped"))
    workload = LedgerWorkload.create(
        setup.size,
        setup.options,
        name=setup.name,
        processes=setup.processes,
        exact=setup.exact,
        large_pages=setup.large_pages,
        large_fraction=setup.large_fraction,
        on_moved=lambda: ends.put("moved"),
    )
    _say({"type": "ready", "name": setup.name, "pid": workload.regions[0].segments[0].pid})
    reason = _first(ends)
    longest = workload.stalls().longest
    workload.stop()
    report = workload.verify()
    found = {key: getattr(report, key) for key in FOUND}
    _say({"type": "ledger", "reason": reason, "intact": report.intact, **found, "longest-stall-ns": longest})
    return 0 if report.intact else 1


def _first(ends: queue.SimpleQueue[str]) -> str:
    """Wait until the workload must end, and return the reason. The function polls, because the kernel may deliver a
    signal to another thread (after SIGCONT)."""
    while True:
        with contextlib.suppress(queue.Empty):
            return ends.get(timeout=LOOK)


def main() -> int:
    """Run the workload whose setup is the only argument, and return the exit code."""
    try:
        if len(sys.argv) != 2:
            raise UsageError("invalid arguments: expected one setup as JSON")
        return run(msgspec.json.decode(sys.argv[1], type=Setup))
    except (PageferryError, msgspec.MsgspecError) as error:
        sys.stderr.write(f"{error}\n")
        return getattr(error, "exit_code", UsageError.exit_code)


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
