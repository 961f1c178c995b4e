"""Checks of a successful migration's statistics: phases add up to the total time, rounds to the transferred bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

PAUSE = ("stop", "last-pages", "load", "hand-over")


def adds_up(phases: dict[str, float], total: float) -> None:
    """Check that the sum of the phases equals the total within 1 %."""
    assert sum(phases.values()) == pytest.approx(total, rel=0.01), (phases, total)


def check_source(lines: Sequence[dict[str, Any]]) -> None:
    """Check the event lines of `migrate`; the last one is the result."""
    result, rounds = lines[-1], [line for line in lines if line["type"] == "round"]
    adds_up(result["phases"], result["total-time"])
    adds_up({name: result["phases"][name] for name in PAUSE}, result["downtime"])
    assert sum(line["sent"] for line in rounds) == result["transferred"], rounds
    pages = result["normal"] + result["duplicate"] + result["skipped"]
    assert sum(line["pages"] for line in rounds) == pages, rounds
    numbers = [line["round"] for line in rounds]
    assert numbers == list(range(1, len(rounds) + 1))
    if result["mode"] == "precopy":
        for line, following in pairwise(rounds):
            # A round can have more pages than remained before it: pages that were sent and then discarded are sent
            # again as zeros.
            assert following["pages"] * 4096 >= line["remaining"], rounds
    assert rounds[-1]["remaining"] == 0
    assert any(line["switch-over"] for line in rounds)
    assert [line["postcopy"] for line in rounds] == [False] * (len(rounds) - 1) + [result["postcopy"] is not None]


def check_receiver(received: dict[str, Any]) -> None:
    """Check the `received` event line of `receive`: its phases, and that they add up to the total time."""
    assert list(received["phases"]) == ["setup", "copy", "load", "populate", "commit", "resume"]
    adds_up(received["phases"], received["total-time"])
