"""Tests of the result tables of the benchmarks, and of their copies in README."""

from __future__ import annotations

from benchmarks.harness import readme
from benchmarks.harness.machine import RESULTS
from benchmarks.harness.tables import Run, at_least, at_most, table, verdict
from benchmarks.systems.row import Row, Switches, render


def test_readme_tables_match_the_results() -> None:
    text = readme.README.read_text()
    assert "<!-- include: benchmarks/results/systems.md -->" in text
    assert readme.included(text) == text, "run: python -m benchmarks.harness.readme"


def test_summary_ends_before_the_second_section() -> None:
    assert (RESULTS / "migrate.md").exists()
    results = "<!-- Written by it. -->\n\nMedian.\n\n### Targets\n\n| a |\n\n### More\n\n| b |\n"
    assert readme.summary(results) == "Median.\n\n| a |"


def test_missing_measurement_does_not_meet_a_target() -> None:
    assert at_most("pause", 4.9, 5, "ms").reached
    assert not at_most("pause", 5.1, 5, "ms").reached
    assert not at_most("pause", None, 5, "ms").reached
    assert not at_least("write", None, 5, "KiB").reached
    assert "**fail**" in verdict([at_least("write", 4, 5, "KiB")])


def test_rows_are_medians_in_the_order_of_their_first_run() -> None:
    runs: list[Run] = [{"way": "b", "ms": 1}, {"way": "a", "ms": 2}, {"way": "b", "ms": 3}, {"way": "a", "ms": None}]
    assert table(runs, ("way",), [("ms", "ms", 0, 1)]).splitlines()[2:] == ["| b | 2 (1–3) |", "| a | 2 (2–2) |"]


def test_systems_are_in_order() -> None:
    rows = [Row(system, "x", "y", 2, 1, "at most 1", True) for system in ("S10", "S2", "S1")]
    assert [line.split(" | ")[0] for line in render(rows).splitlines()[2:]] == ["| S1", "| S2", "| S10"]
    assert Switches(frozenset({"S2"})).choose("S2", "on", "off") == "off"
    assert Switches(frozenset({"S2"})).choose("S1", "on", "off") == "on"
