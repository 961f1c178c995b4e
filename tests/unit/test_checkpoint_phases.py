"""Tests of the order of the phases of a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from pageferry.checkpoints.options import Mode
from pageferry.checkpoints.statistics import Phase, Statistics

LAZY = (Phase.ARM, Phase.STOP, Phase.DISKS, Phase.STATE, Phase.PROTECT, Phase.RESUME, Phase.SAVE, Phase.PUBLISH)
STOP = (Phase.STOP, Phase.DISKS, Phase.STATE, Phase.ARM, Phase.SAVE, Phase.RESUME, Phase.PUBLISH)


def after(mode: Mode, phases: Sequence[Phase]) -> Statistics:
    """Return the statistics of a checkpoint that has entered these phases, in order."""
    statistics = Statistics(mode)
    for phase in phases:
        statistics.enter(phase)
    return statistics


def refused(mode: Mode, phases: Sequence[Phase]) -> set[Phase]:
    """Return the phases that the statistics refuse after these phases."""
    found = set()
    for phase in Phase:
        try:
            after(mode, phases).enter(phase)
        except RuntimeError:
            found.add(phase)
    return found


@pytest.mark.parametrize(("mode", "phases"), [("lazy", LAZY), ("stop", STOP)])
def test_attempt_follows_the_order_of_its_mode(mode: Mode, phases: tuple[Phase, ...]) -> None:
    assert after(mode, phases).phase is Phase.PUBLISH
    assert after(mode, (*phases, Phase.PUBLISHED)).phase is Phase.PUBLISHED
    assert refused(mode, ()) == set(Phase) - {phases[0], Phase.PUBLISH}
    assert refused(mode, phases) == set(Phase) - {phases[0], Phase.UPLOAD, Phase.PUBLISHED}
    assert refused(mode, (*phases, Phase.UPLOAD)) == set(Phase) - {Phase.PUBLISHED}
    assert refused(mode, (*phases, Phase.PUBLISHED)) == set(Phase)


@pytest.mark.parametrize(("mode", "phases"), [("lazy", LAZY), ("stop", STOP)])
def test_attempt_can_fail_in_every_phase_and_be_repeated(mode: Mode, phases: tuple[Phase, ...]) -> None:
    for count in range(1, len(phases)):
        after(mode, (*phases[:count], Phase.RESUME, Phase.PUBLISH, *phases, Phase.PUBLISHED))
        after(mode, (*phases[:count], Phase.PUBLISH, *phases, Phase.PUBLISHED))


def test_rounds_before_a_switch_to_mode_stop_do_not_count_as_downtime() -> None:
    begin = time.perf_counter()
    statistics = Statistics("lazy")
    statistics.enter(Phase.ARM, at=begin)
    statistics.enter(Phase.PUBLISH, at=begin + 60)
    statistics.switch_to_stop()
    for second, phase in enumerate(STOP):
        statistics.enter(phase, at=begin + 61 + second)
    assert statistics.mode == "stop"
    assert statistics.downtime == pytest.approx(6000, abs=1)


def test_memory_is_not_protected_before_the_state_is_saved() -> None:
    with pytest.raises(RuntimeError, match="phase protect: it cannot follow phase disks"):
        after("lazy", LAZY[:3]).enter(Phase.PROTECT)
