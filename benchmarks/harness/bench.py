"""Command of a benchmark: it measures, compares the figures with the targets, and writes both to files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.harness import machine, tables
from benchmarks.harness.tables import Run, Target

Results = dict[str, list[Run]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """Parameters of a measurement."""

    folder: Path
    """Directory for sockets and images, on tmpfs so that no disk is measured."""
    repetitions: int
    quick: bool
    """Whether to measure small workloads once, as a test of the benchmark. The figures are meaningless."""

    def chosen(self, cases: Sequence[T]) -> Sequence[T]:
        """Return the cases to measure: only the first with `quick`."""
        return cases[:1] if self.quick else cases

    def period(self, seconds: float) -> float:
        """Return the duration of an observation, seconds: half of it with `quick`."""
        return seconds / 2 if self.quick else seconds


@dataclass(frozen=True, slots=True)
class Bench:
    """Benchmark with its measurements, targets and tables."""

    name: str
    questions: Mapping[str, Callable[[Setting], list[Run]]]
    """Measurements by name, in the order of execution; `--only` selects a subset."""
    judge: Callable[[Results], list[Target]]
    tables: Callable[[Results], list[str]]
    """Function that returns headings and tables, alternating."""
    repetitions: int = 3
    """Default number of repetitions of each measurement."""

    def main(self) -> int:
        """Measure as the command line requests. Return the exit code, 0 unless an operation failed.

        Only a complete run at full size is written to benchmarks/results; the results of other runs are printed as
        JSON.
        """
        args = self._arguments()
        chosen = args.only or list(self.questions)
        began = time.monotonic()
        results = self._measure(chosen, args)
        if args.quick or args.only:
            print(json.dumps(results, indent=1))
            return 0
        about = machine.about() | {"repetitions": args.repetitions, "seconds": round(time.monotonic() - began)}
        self._write(about, results)
        return 0

    def _arguments(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            description=f"Run the {self.name} benchmark of pageferry and of the programs that it is compared with."
        )
        parser.add_argument(
            "--repetitions",
            type=int,
            default=self.repetitions,
            help="repetitions of each measurement (default: %(default)s)",
        )
        parser.add_argument("--quick", action="store_true", help="measure small workloads once; only print the results")
        parser.add_argument(
            "--only", choices=self.questions, action="append", help="measure only this part, and only print the results"
        )
        parser.add_argument(
            "--folder", type=Path, default=Path("/dev/shm"), help="directory for images (default: %(default)s)"
        )
        return parser.parse_args()

    def _measure(self, chosen: list[str], args: argparse.Namespace) -> Results:
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=args.folder))
        os.environ["PAGEFERRY_RUN_DIR"] = str(folder / "run")
        setting = Setting(folder, 1 if args.quick else args.repetitions, args.quick)
        results: Results = {}
        try:
            for name in chosen:
                print(f"{name}...", file=sys.stderr, flush=True)
                began = time.monotonic()
                results[name] = self.questions[name](setting)
                print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return results

    def _write(self, about: dict[str, object], results: Results) -> None:
        targets = self.judge(results)
        described = machine.described(about)
        parts = [
            f"<!-- Written by benchmarks/{self.name}.py. -->",
            f"Median (minimum–maximum). {described}.",
            *(("### Targets", tables.verdict(targets)) if targets else ()),
            *self.tables(results),
        ]
        text = "\n\n".join(parts) + "\n"
        machine.RESULTS.mkdir(exist_ok=True)
        raw = json.dumps({"about": about, "runs": results}, indent=1)
        (machine.RESULTS / f"{self.name}.json").write_text(raw + "\n")
        (machine.RESULTS / f"{self.name}.md").write_text(text)
        print(text)
        for target in targets:
            print(target)
