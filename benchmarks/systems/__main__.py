"""Table of all ten systems: `make systems`, or `python -m benchmarks.systems [--quick] [--without S7]`.

The benchmark measures each system with and without its mechanism, and a comparable program if there is one. It compares
the figure with the target in docs/benchmarks.md. `--without` disables a mechanism, to check that its row fails. Only a
complete run at full size is written to benchmarks/results and into README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks.harness import machine, readme
from benchmarks.harness.bench import Setting
from benchmarks.systems import looks, moves, saves
from benchmarks.systems.row import Row, Show, Switches, render

SHOWS: dict[str, tuple[tuple[str, ...], Show]] = {
    "moved arena": (("S1", "S5"), moves.arena),
    "moved guest": (("S1", "S7"), moves.guest),
    "traces": (("S2",), moves.traces),
    "large pages": (("S6", "S7"), moves.large),
    "activity": (("S3",), looks.activity),
    "sharing": (("S9",), looks.sharable),
    "saved guest": (("S4", "S10"), saves.guest),
    "saved arena": (("S4", "S8", "S10"), saves.arena),
}
SYSTEMS = tuple(f"S{number}" for number in range(1, 11))
MAX_SECONDS = 150
"""Timeout of one measurement, seconds. All measurements together normally take less than ten minutes."""


def main() -> int:
    """Measure the selected systems, and print the table. Write it to files after a complete run.

    Return the exit code: 0 if all systems could be measured, otherwise 1. Missed targets are not errors.
    """
    args = _arguments()
    machine.require("make systems", "rustc", "setpriv")
    began = time.monotonic()
    rows = _measure(args)
    table = render(rows)
    code = int(any(row.mechanism is None for row in rows))
    if args.quick or args.only or args.without:
        print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table)
        return code
    about = machine.about() | {"seconds": round(time.monotonic() - began)}
    described = machine.described(about)
    text = f"<!-- Written by benchmarks.systems. -->\n\n{described}.\n\n{table}\n"
    raw = json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1)
    (machine.RESULTS / "systems.json").write_text(raw + "\n")
    (machine.RESULTS / "systems.md").write_text(text)
    readme.update()
    print(text)
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the ten systems, each with and without its mechanism.")
    parser.add_argument("--quick", action="store_true", help="measure small workloads, and only print the table")
    parser.add_argument(
        "--only",
        choices=(*SYSTEMS, *SHOWS),
        action="append",
        help="measure only this system or in this measurement, and only print the table",
    )
    parser.add_argument(
        "--without", choices=SYSTEMS, action="append", default=[], help="disable the mechanism of this system"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--folder", type=Path, default=Path("/dev/shm"), help="directory for images (default: %(default)s)"
    )
    return parser.parse_args()


def _measure(args: argparse.Namespace) -> list[Row]:
    folder = Path(tempfile.mkdtemp(prefix="systems-", dir=args.folder))
    os.environ["PAGEFERRY_RUN_DIR"] = str(folder / "run")
    setting, switches = Setting(folder, 1, args.quick), Switches(frozenset(args.without))
    wanted = set(args.only or SYSTEMS)
    rows: list[Row] = []
    try:
        for name, (systems, show) in SHOWS.items():
            if wanted & {name, *systems}:
                print(f"{name}...", file=sys.stderr, flush=True)
                began = time.monotonic()
                rows += _shown(name, systems, partial(show, setting, switches))
                print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _shown(name: str, systems: tuple[str, ...], show: Callable[[], list[Row]]) -> list[Row]:
    """Return the rows of a measurement. If the measurement fails, return one row per system with the reason."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(MAX_SECONDS)
    try:
        return show()
    except Exception as why:
        traceback.print_exc()
        return [Row.unmeasured(system, name, why) for system in systems]
    finally:
        signal.alarm(0)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"cannot complete the measurement within {MAX_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
