"""Tests of the tables that `checkpoint`, `restore` and `shutdown` print."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pageferry.control.events import StopResult
from pageferry.events import Event
from pageferry.report.checkpoint import CheckpointView
from pageferry.report.control import ControlView
from pageferry.report.restore import RestoreView
from pageferry.report.text import PlainView
from tests import logs


def printed(view: PlainView, result: Event) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(view.result(result))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def result_of(write: Callable[[Path], None], patch: pytest.MonkeyPatch) -> Event:
    """Return the result in the log that `write`, a function of `tests.logs`, writes."""
    found: list[Event] = []
    patch.setattr(logs, "written", lambda path, verb, arguments, told: found.append(told[-1][1]))
    write(Path("unused"))
    return found[0]


def test_numbers_of_a_checkpoint_have_separators_and_units(monkeypatch: pytest.MonkeyPatch) -> None:
    said = printed(CheckpointView(), result_of(logs.save, monkeypatch))
    assert "stop 800 us, state 1.6 ms, protect 200 us, resume 400 us" in said
    assert "140,000 stored, 6,200 duplicate, 31,000 zero, 2,000 pattern, 82,944 not present" in said
    assert "stored pages compressed 1.78:1 (lz4)" in said
    assert "1,800, mean 44 us, maximum 910 us" in said


def test_numbers_of_a_restore_have_separators_and_units(monkeypatch: pytest.MonkeyPatch) -> None:
    said = printed(RestoreView(), result_of(logs.bring, monkeypatch))
    assert "1,071, of which 960 on deferred pages; mean 44 us, p99 1.0 ms, maximum 3.1 ms" in said
    assert "310 MiB of /images/web.img; 174,000 pages prefetched" in said


def test_end_of_a_shutdown_states_its_time_and_cause() -> None:
    for forced, text in ((False, "shut down after 2.1 s"), (True, "stopped after 2.1 s, because it did not shut down")):
        result = StopResult(workload="web", forced=forced, duration_ms=2100.0)
        assert printed(ControlView(), result) == f"web: {text}\n"
