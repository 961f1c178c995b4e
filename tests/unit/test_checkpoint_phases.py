"""Tests of the order of the phases of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pageferry.checkpoints.options import Mode
from pageferry.checkpoints.statistics import Phase, Statistics

LAZY = (Phase.ARM, Phase.STOP, Phase.STATE, Phase.PROTECT, Phase.RESUME, Phase.SAVE, Phase.PUBLISH)
STOP = (Phase.STOP, Phase.STATE, Phase.ARM, Phase.SAVE, Phase.RESUME, Phase.PUBLISH)


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
    assert refused(mode, ()) == set(Phase) - {phases[0]}
    assert refused(mode, phases) == set(Phase) - {phases[0], Phase.PUBLISHED}
    assert refused(mode, (*phases, Phase.PUBLISHED)) == set(Phase)


@pytest.mark.parametrize(("mode", "phases"), [("lazy", LAZY), ("stop", STOP)])
def test_attempt_can_fail_in_every_phase_and_be_repeated(mode: Mode, phases: tuple[Phase, ...]) -> None:
    for count in range(1, len(phases)):
        after(mode, (*phases[:count], Phase.RESUME, Phase.PUBLISH, *phases, Phase.PUBLISHED))
        after(mode, (*phases[:count], Phase.PUBLISH, *phases, Phase.PUBLISHED))


def test_memory_is_not_protected_before_the_state_is_saved() -> None:
    with pytest.raises(RuntimeError, match="phase protect cannot follow phase stop"):
        after("lazy", LAZY[:2]).enter(Phase.PROTECT)
