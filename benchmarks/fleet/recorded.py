"""Costs of moves that other benchmarks have recorded, drawn at random by the simulation."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import machine


@dataclass(frozen=True, slots=True)
class Recorded:
    """Recorded repetitions, seconds."""

    setup: tuple[float, ...]
    """Duration of a whole `pageferry migrate` without its transfer."""
    downtime: tuple[float, ...]
    """Downtime of pre-copy."""
    late: tuple[float, ...]
    """Downtime of post-copy and hybrid."""

    @classmethod
    def load(cls) -> Recorded:
        """Read migrate.json and postcopy.json."""
        guests = [run for run in _runs("migrate", "guests") if str(run["line"]).startswith("pageferry")]
        rate = max(run["first-round-mbps"] for run in _runs("migrate", "throughput")) * 125.0  # bytes per ms
        late = [run for run in _runs("postcopy", "guests") if run["line"] == "pageferry"]
        return cls(
            setup=tuple((run["elapsed-ms"] - run["transferred"] / rate) / 1000 for run in guests),
            downtime=tuple(run["downtime-ms"] / 1000 for run in guests),
            late=tuple(run["downtime-ms"] / 1000 for run in late),
        )

    def draw_setup(self, chance: random.Random) -> float:
        """Return one of the recorded durations."""
        return chance.choice(self.setup)

    def draw_downtime(self, chance: random.Random, late: bool) -> float:
        """Return one of the recorded downtimes. `late`: of post-copy or hybrid."""
        return chance.choice(self.late if late else self.downtime)


def _runs(name: str, part: str) -> list[dict[str, Any]]:
    raw = json.loads((machine.RESULTS / f"{name}.json").read_text())
    runs: list[dict[str, Any]] = raw["runs"][part]
    return runs
