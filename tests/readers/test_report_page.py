"""Tests of report pages in a browser: complete, readable on small and dark screens, without network requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.report.event_log import Log
from pageferry.report.page import page
from pageferry.report.run import Run
from tests.logs import MAKERS
from tests.readers import chromium
from tests.readers.chromium import Browser

KEPT = Path(__file__).parent.parent.parent / ".cache" / "screenshots"
"""Directory in which the tests leave screenshots for inspection."""

SIZES = [(1280, False), (390, False), (390, True)]

FIGURES = {
    "migrate": ["rounds", "speeds", "downtime", "large-pages"],
    "postcopy": ["rounds", "speeds", "downtime", "postcopy", "latency", "large-pages"],
    "checkpoint": ["saving", "downtime", "classes"],
    "restore": ["running", "arrival", "working-set", "latency"],
    "large-pages": ["activity", "regions", "heat-map"],
    "sharing": ["curve", "classes"],
}

BOXES = """[...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const drawn = [...svg.querySelectorAll('rect, path, circle')].filter(one => {
    const b = one.getBoundingClientRect(), fill = getComputedStyle(one).fill;
    return b.width > 0 && b.height > 0 && fill !== 'rgb(0, 0, 0)';
  });
  return [figure.id, box.width, box.height, drawn.length, svg.getAttribute('aria-label')];
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium in PATH: `make system` installs one as root on Debian")
    with Browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("logs")
    made = {}
    for name, make in MAKERS.items():
        made[name] = folder / f"{name}.log"
        make(made[name])
    return made


def written(paths: list[Path], folder: Path) -> Path:
    file = folder / "report.html"
    file.write_text(page([Run.of(Log.read(path)) for path in paths]), encoding="utf-8")
    return file


@pytest.mark.parametrize(("width", "dark"), SIZES)
@pytest.mark.parametrize("verb", FIGURES)
def test_report_page_shows_all_figures(
    browser: Browser, logs: dict[str, Path], tmp_path: Path, verb: str, width: int, dark: bool
) -> None:
    browser.complaints.clear()
    browser.requests.clear()
    file = written([logs[verb]], tmp_path)
    browser.open(file, width, dark=dark)
    boxes = browser.evaluate(BOXES)
    assert [name.removesuffix("-0") for name, *_ in boxes] == FIGURES[verb]
    for name, across, down, drawn, label in boxes:
        assert across > 250, name
        assert down > 20, name
        assert drawn > 0, name
        assert len(label) > 10, name
    assert "web" in browser.evaluate("document.querySelector('h1').innerText")
    assert browser.evaluate("document.querySelectorAll('.leads dd').length") >= 3
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    assert browser.evaluate(smallest) >= 8
    assert browser.requests == [file.as_uri()]
    assert browser.complaints == []
    red, green, blue = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (red + green + blue < 150) == dark
    KEPT.mkdir(parents=True, exist_ok=True)
    picture = browser.screenshot(KEPT / f"report-{verb}-{width}{'-dark' if dark else ''}.png")
    assert len(picture) > 20_000


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_report_page_shows_runs_side_by_side(
    browser: Browser, logs: dict[str, Path], tmp_path: Path, width: int, dark: bool
) -> None:
    browser.open(written([logs["migrate"], logs["failed"], logs["checkpoint"]], tmp_path), width, dark=dark)
    lefts = browser.evaluate("[...document.querySelectorAll('article')].map(one => one.getBoundingClientRect().left)")
    assert len(lefts) == 3
    assert (lefts[1] > lefts[0]) == (width > 500)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert "NotConverging" in browser.evaluate("document.querySelectorAll('article')[1].innerText")
    assert browser.evaluate("document.querySelectorAll('.comparison tbody tr').length") > 2
    KEPT.mkdir(parents=True, exist_ok=True)
    browser.screenshot(KEPT / f"report-several-{width}{'-dark' if dark else ''}.png")


def test_report_page_has_a_table_for_each_figure(browser: Browser, logs: dict[str, Path], tmp_path: Path) -> None:
    browser.open(written([logs["migrate"]], tmp_path), 390)
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    cells = browser.evaluate(
        "[...document.querySelectorAll('#rounds-0 tbody tr:first-child td')].map(c => c.innerText)"
    )
    assert cells == ["1", "131,072", "400 MiB", "90 MiB", "1.2 s"]
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
