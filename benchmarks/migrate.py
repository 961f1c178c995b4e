"""Migration, side by side with its peers: `make bench-migrate`, or `python benchmarks/migrate.py [--repetitions N]`.

Writes raw data and tables to benchmarks/results. The method is described in docs/benchmarks.md. The exit code is 0
unless something did not work; targets that are missed are printed, and no error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measuring.ballast import Ballast  # noqa: E402
from benchmarks.moving import populate, side_by_side, stalls, tables, targets, throughput  # noqa: E402
from benchmarks.moving.guest import BUSY, Place  # noqa: E402
from benchmarks.moving.pageferry_line import PageferryLine  # noqa: E402
from tests.guest import initrd  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
KERNEL = ROOT / ".cache" / "guest" / "vmlinuz"
QEMUS = {"7.2": Path("/usr/bin/qemu-system-x86_64"), "10.0": ROOT / ".cache" / "qemu-10" / "bin" / "qemu-system-x86_64"}
GUEST_BALLAST = 1280 << 20
"""Bytes: a guest of 1 GiB that comes to be all in memory, and some."""
ARENA_BALLAST = 1152 << 20
QUESTIONS = ("guests", "throughput", "populate", "ledger", "stalls")
"""In this order; `--only` chooses."""


def main() -> int:
    """Measure, write, judge."""
    args = _arguments()
    _require()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    os.environ["PAGEFERRY_RUN_DIR"] = str(folder / "run")
    started = time.monotonic()
    try:
        results = _measure(folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - started)
    if set(results) != set(QUESTIONS):
        print(json.dumps(results, indent=1))
        return 0
    about = _about() | {"repetitions": args.repetitions, "seconds": seconds}
    verdict = targets.judge(results)
    text = tables.render(about, results, verdict)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "migrate.json").write_text(json.dumps({"about": about, "runs": results}, indent=1) + "\n")
    (RESULTS / "migrate.md").write_text(text)
    print(text)
    for target in verdict:
        print(f"{'pass' if target.reached else 'FAIL'}  {target.what}: {target.found} (wanted {target.wanted})")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Migration, side by side with its peers.")
    parser.add_argument("--repetitions", type=int, default=3, help="of everything (%(default)s)")
    parser.add_argument("--only", choices=QUESTIONS, action="append", help="print one part instead of writing tables")
    return parser.parse_args()


def _require() -> None:
    missing = [str(path) for path in (KERNEL, QEMUS["7.2"]) if not path.exists()]
    missing += [program for program in ("iperf3", "rustc") if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        what = ", ".join(missing) or "what `make system` installs"
        sys.exit(f"bench-migrate needs {what}, and root: run `make system` as root, then this")


def _measure(folder: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    place = Place(folder, KERNEL, initrd.build(ROOT / ".cache" / "guest" / "checker"))
    qemus = {version: path for version, path in QEMUS.items() if path.exists()}
    count: int = args.repetitions
    results: dict[str, list[dict[str, Any]]] = {}
    for question in args.only or QUESTIONS:
        print(f"{question}...", file=sys.stderr, flush=True)
        with Ballast(GUEST_BALLAST if question in ("guests", "populate") else ARENA_BALLAST) as ballast:
            match question:
                case "guests":
                    results[question] = side_by_side.measure(place, qemus, ballast, count)
                case "throughput":
                    results[question] = throughput.measure(ballast, count)
                case "populate":
                    results[question] = _populate(place, qemus, ballast, count)
                case "ledger":
                    results[question] = populate.of_ledger(ballast, count)
                case _:
                    results[question] = stalls.measure(count)
    return results


def _populate(place: Place, qemus: dict[str, Path], ballast: Ballast, count: int) -> list[dict[str, Any]]:
    line = PageferryLine("populate", place, qemus.get("10.0", QEMUS["7.2"]), BUSY)
    with side_by_side.booted([(line, [])]):
        ballast.hold()
        return populate.of_guest(line, ballast, count)


def _about() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {"CPU": f"{os.cpu_count()} x {model}", "kernel": platform.release()}


if __name__ == "__main__":
    sys.exit(main())
