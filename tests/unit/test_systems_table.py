"""Tests of the table of the ten systems: order, numbers, and failed measurements."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.harness.bench import Setting
from benchmarks.systems import __main__ as systems
from benchmarks.systems.row import Row, Switches, render


def shown(setting: Setting, switches: Switches) -> list[Row]:
    return [Row("S10", "a guest", "ms", 1234.5, 1.25, "at most 5", True, 900, "QEMU")]


def fails(setting: Setting, switches: Switches) -> list[Row]:
    raise RuntimeError("KSM is running |\n already")


def test_failed_measurement_has_a_reason_and_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(systems, "SHOWS", {"last": (("S10",), shown), "broken": (("S6", "S7"), fails)})
    monkeypatch.setenv("PAGEFERRY_RUN_DIR", "")  # the tested function sets it; pytest restores it after the test
    rows = systems._measure(argparse.Namespace(folder=tmp_path, quick=True, without=[], only=None))
    lines = render(rows).splitlines()[2:]
    assert lines == [
        "| S6 | broken | not measured, RuntimeError: KSM is running / already | - | - | - |  | **fail** |",
        "| S7 | broken | not measured, RuntimeError: KSM is running / already | - | - | - |  | **fail** |",
        "| S10 | a guest | ms | 1,234 | 1.25 | 900 (QEMU) | at most 5 | pass |",
    ]
    assert "RuntimeError" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_switch_replaces_the_mechanism() -> None:
    switches = Switches(frozenset({"S1"}))
    assert switches.choose("S1", "all", "none") == "none"
    assert switches.choose("S5", "all", "none") == "all"
