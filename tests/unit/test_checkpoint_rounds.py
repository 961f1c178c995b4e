"""Tests of the rounds of a checkpoint with a scripted saver: order of the calls to the saver, and end of the rounds."""

from __future__ import annotations

from typing import Literal

import pytest

from pageferry.checkpoints.rounds import CHUNK, Rounds


class ScriptedSaver:
    """Saver that records calls. `remaining`: results of `collect` and `scan`, in order; `lost`: results of `lost`."""

    def __init__(
        self, pages: Literal["swept", "written", "all"], remaining: list[int], lost: tuple[bool, ...] = (False,)
    ) -> None:
        self.pages = pages
        self.calls: list[object] = []
        self._remaining = iter(remaining)
        self._lost = iter(lost)

    def collect(self) -> int:
        self.calls.append("collect")
        return next(self._remaining)

    def scan(self) -> int:
        self.calls.append("scan")
        return next(self._remaining)

    def copy(self) -> None:
        self.calls.append("copy")

    def copy_range(self, region: int, first: int, count: int) -> None:
        self.calls.append(("copy", region, first, count))

    def lost(self) -> bool:
        self.calls.append("lost")
        return next(self._lost)

    def drain(self) -> None:
        self.calls.append("drain")

    def load(self, region: int, first: int, count: int) -> None:
        self.calls.append(("load", region, first, count))


def run(saver: ScriptedSaver, max_remaining: int = 10, regions: tuple[int, ...] = ()) -> Rounds:
    rounds = Rounds(max_remaining)
    rounds.run(saver, regions, saver.drain, saver.load)
    return rounds


def test_saver_without_trace_copies_nothing() -> None:
    saver = ScriptedSaver("swept", [])
    assert run(saver).count == 0
    assert saver.calls == []


def test_few_written_pages_are_left_for_the_pause() -> None:
    saver = ScriptedSaver("written", [9, 10])
    rounds = run(saver)
    assert saver.calls == ["collect", "scan", "lost"]
    assert rounds.count == 0


def test_pages_are_drained_and_copied_until_few_remain() -> None:
    saver = ScriptedSaver("written", [95, 100, 50, 25, 10])
    rounds = run(saver)
    assert saver.calls == ["collect", "scan", *["drain", "copy", "collect"] * 3, "lost"]
    assert rounds.count == 3


@pytest.mark.parametrize(("before", "after"), [(100, 51), (101, 51), (100, 100), (100, 300)])
def test_round_that_leaves_more_than_half_of_the_pages_fails(before: int, after: int) -> None:
    saver = ScriptedSaver("written", [before, before, after])
    with pytest.raises(LookupError, match="rounds do not converge"):
        run(saver)
    assert saver.calls[-3:] == ["drain", "copy", "collect"]


@pytest.mark.parametrize(("before", "after"), [(11, 10), (15, 8), (19, 10)])
def test_round_that_leaves_few_pages_succeeds(before: int, after: int) -> None:
    saver = ScriptedSaver("written", [before, before, after])
    rounds = run(saver, max_remaining=10)
    assert saver.calls == ["collect", "scan", "drain", "copy", "collect", "lost"]
    assert rounds.count == 1


def test_discarded_memory_is_scanned_and_copied_again() -> None:
    saver = ScriptedSaver("written", [50, 60, 5, 70, 8], (True, False))
    rounds = run(saver)
    once = ["scan", "drain", "copy", "collect", "lost"]
    assert saver.calls == ["collect", *once, *once]
    assert rounds.count == 2


def test_memory_that_is_discarded_in_each_attempt_fails() -> None:
    saver = ScriptedSaver("written", [0, 0, 0, 0], (True, True, True))
    with pytest.raises(LookupError, match="discarded in each of"):
        run(saver)
    assert saver.calls == ["collect", *["scan", "lost"] * 3]


def test_all_pages_are_loaded_and_copied_in_chunks_before_the_first_collection() -> None:
    saver = ScriptedSaver("all", [3, 4])
    rounds = run(saver, regions=(CHUNK + 7, 1))
    chunks = [(0, 0, CHUNK), (0, CHUNK, 7), (1, 0, 1)]
    copies = [(name, *chunk) for chunk in chunks for name in ("load", "copy")]
    assert saver.calls == ["drain", *copies, "collect", "scan", "lost"]
    assert rounds.count == 1


def test_repeated_run_counts_its_own_rounds() -> None:
    rounds = Rounds(10)
    for saver in (ScriptedSaver("written", [20, 20, 5]), ScriptedSaver("written", [20, 20, 5])):
        rounds.run(saver, (), saver.drain)
        assert rounds.count == 1
        assert rounds.seconds >= 0
