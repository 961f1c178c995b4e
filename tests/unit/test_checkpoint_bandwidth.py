"""Tests of the bandwidth limit of a checkpoint, which applies only while the workload runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pageferry.checkpoints.attempt import attempt
from pageferry.checkpoints.options import Mode, Options
from pageferry.checkpoints.statistics import Statistics
from pageferry.checkpoints.target import FileTarget

LIMIT = 1 << 20


class Disks:
    """Workload that records the bandwidth limit of its disks."""

    def __init__(self) -> None:
        self.live: object | None = object()
        self.limits: list[int] = []

    def save_disks(self, mode: str, folder: Path | None, image: Path, image_id: str, bandwidth: int = 0) -> None:
        self.limits.append(bandwidth)


@pytest.mark.parametrize(
    ("mode", "live", "limit"), [("lazy", True, LIMIT), ("stop", True, 0), ("lazy", False, 0), ("stop", False, 0)]
)
def test_copies_of_disks_are_limited_while_the_workload_runs(mode: Mode, live: bool, limit: int) -> None:
    workload = Disks()
    if not live:
        workload.live = None
    options = Options(bandwidth=LIMIT)
    request = SimpleNamespace(workload=workload, options=options, target=FileTarget(Path("image")), id=bytes(16))
    # A checkpoint can switch to mode `stop` itself: the options in effect are those of the preparation.
    preparation: Any = SimpleNamespace(
        request=request, statistics=Statistics(mode), options=Options(mode=mode, bandwidth=LIMIT)
    )
    attempt(preparation, -1)
    assert workload.limits == [limit]
