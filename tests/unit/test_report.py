"""Tests of reports on event logs, human-readable and as JSON, and of their charts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pageferry.cli.main import main
from pageferry.errors import UsageError
from pageferry.report import charts
from pageferry.report.event_log import EventLog, Log, header
from pageferry.report.page import page
from pageferry.report.run import Run
from pageferry.report.svg import WIDTH, binary_ticks, ticks
from tests.logs import MAKERS, failed, migrate, save, written

FORM = "{:.0f}".format
AXES = charts.Axes(FORM, FORM, "x", binary=False)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def numbers(root: ElementTree.Element, tag: str, name: str) -> list[float]:
    return [float(one.attrib[name]) for one in root.iter(tag)]


@given(st.floats(1e-3, 1e15), st.sampled_from([ticks, binary_ticks]))
def test_ticks_just_cover_the_values(most: float, make: object) -> None:
    found = make(most)  # type: ignore[operator]
    assert found[0] == 0
    assert found[-1] >= most * 0.999
    assert found[-2] < most
    assert 2 <= len(found) <= 8


@pytest.mark.parametrize("most", [0, -1, float("nan"), float("inf")])
def test_axis_without_values_has_ticks(most: float) -> None:
    assert ticks(most) == [0.0, 1.0]


def test_heights_of_columns_are_proportional() -> None:
    drawn = parsed(charts.columns("l", ["1", "2"], [charts.Series("a", 1, [100, 50])], FORM, "x"))
    high, low = numbers(drawn, "rect", "height")
    assert high == pytest.approx(2 * low, rel=0.01)


@given(
    st.lists(st.floats(0, 1e12), min_size=1, max_size=40),
    st.sampled_from(["columns", "lines", "bars", "stack", "strips", "histogram", "dots", "heat"]),
)
def test_charts_are_well_formed_and_stay_in_their_frame(values: list[float], kind: str) -> None:
    names = [f"<{number}&>" for number in range(len(values))]
    cells = [charts.Strip(name, [value / 1e12, 0, 1]) for name, value in zip(names, values, strict=True)]
    rows = [charts.Bar(name, value) for name, value in zip(names, values, strict=True)]
    points = list(enumerate(values))
    svg = {
        "columns": lambda: charts.columns("l", names, [charts.Series("s", 1, values)], FORM, "x"),
        "lines": lambda: charts.lines("l", [charts.Line("s", 1, points, area=True)], AXES, [(1, "m")]),
        "bars": lambda: charts.bars("l", rows, FORM),
        "stack": lambda: charts.stack("l", rows, FORM),
        "strips": lambda: charts.strips("l", cells, "a", "b"),
        "histogram": lambda: charts.histogram("l", [*names, "end"], list(map(int, values)), "x", [(0.5, "m")]),
        "dots": lambda: charts.dots("l", points, (len(values), max(values)), AXES),
        "heat": lambda: charts.heat("l", cells, "x"),
    }[kind]()
    root = parsed(svg)
    assert root.attrib["aria-label"] == "l"
    height = float(root.attrib["height"])
    for one in root.iter("rect"):
        x, y, wide, high = (float(one.attrib[name]) for name in ("x", "y", "width", "height"))
        assert -1 <= x <= x + wide <= WIDTH + 1.5
        assert -1.5 <= y <= y + high <= height + 1


def test_signal_is_shown_by_name(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EventLog(path, header("restore", {"name": "web"}))
    log.end(143, KeyboardInterrupt())
    run = Run.of(Log.read(path))
    assert (run.outcome, run.message) == ("interrupted", "Ended by SIGTERM.")


@pytest.mark.parametrize("kind", MAKERS)
def test_page_is_self_contained_and_complete(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    MAKERS[kind](path)
    run = Run.of(Log.read(path))
    assert run.figures
    assert any(fact.lead for fact in run.facts)
    for figure in run.figures:
        assert figure.rows
        assert all(len(row) == len(figure.columns) for row in figure.rows)
        parsed(figure.svg)
    text = page([run])
    assert text.count("<figure") == len(run.figures) == text.count("<summary>Numbers")
    for forbidden in ("http://", "https://", "<script", "url(", "@import"):
        assert forbidden not in text


junk = st.sampled_from([None, -1, 0, 1e300, 1 << 62, "x", "<i>", True, [], [-5], [1 << 40] * 3, {}, {"a": 1}])


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_inconsistent_log_is_drawn_or_refused(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "log"
    MAKERS[kind](path)
    lines = path.read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    event = json.loads(lines[number])
    place = event
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(junk)
        break
    lines[number] = json.dumps(event)
    path.write_text("\n".join(lines) + "\n")
    with contextlib.suppress(UsageError):
        assert "<i>" not in page([Run.of(Log.read(path))])


def test_texts_of_a_log_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    written(path, "migrate", {"name": "<b onclick=x>"}, [], ValueError("<script>alert(1)</script>"))
    text = page([Run.of(Log.read(path))])
    assert "<b " not in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_json_report_has_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    migrate(tmp_path / "one")
    failed(tmp_path / "two")
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--output", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    good, bad = said["runs"]
    assert (good["outcome"], good["exit-code"], good["subject"]) == ("done", 0, "web")
    assert (bad["outcome"], bad["exit-code"]) == ("failed", 24)
    assert "NotConverging" in bad["message"]
    facts = {fact["name"]: fact["value"] for fact in good["facts"]}
    assert (facts["downtime"], facts["rounds"], facts["transferred"]) == (21.4, 4, 503 << 20)
    rounds = next(figure for figure in good["figures"] if figure["name"] == "rounds")
    assert rounds["rows"][0] == [1, 131072, 400 << 20, 90 << 20, 1200.0]
    assert [column[1] for column in rounds["columns"]] == ["count", "count", "bytes", "bytes", "ms"]


def test_human_report_has_tables_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    migrate(tmp_path / "one")
    save(tmp_path / "two")
    html = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--html", str(html)]) == 0
    out = capsys.readouterr().out
    for words in ("migrate web", "checkpoint web", "21.4 ms", "Downtime", str(html)):
        assert words in out
    assert html.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "page.html", "two"]


def test_runs_of_one_kind_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("monday", "image", "tuesday")]
    for path in paths:
        (save if path.name == "image" else migrate)(path)
    html = tmp_path / "page.html"
    assert main(["report", *map(str, paths), "--html", str(html)]) == 0
    table = capsys.readouterr().out.split("Side by side")[1]
    assert "monday" in table
    assert "tuesday" in table
    assert "image" not in table
    assert html.read_text().count("Side by side") == 1
    assert html.read_text().count('<th scope="col"><a href="#run-2">') == 1


def test_log_of_a_killed_command_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    migrate(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + b'{"at-ms": 17')
    assert main(["report", str(path)]) == 0
    out = capsys.readouterr().out
    assert "unfinished" in out
    assert "remaining" in out


def test_page_that_cannot_be_written_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    migrate(tmp_path / "log")
    assert main(["report", str(tmp_path / "log"), "--html", str(tmp_path / "no" / "page")]) == 2
    assert "--html" in capsys.readouterr().err


def test_malformed_lines_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "log"
    migrate(path)
    path.write_text(path.read_text().replace('"dirty-rate"', '"dirt"'))
    run = Run.of(Log.read(path))
    assert [figure.name for figure in run.figures] == ["downtime", "large-pages"]
