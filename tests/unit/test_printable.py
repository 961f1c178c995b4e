"""Tests that terminal escapes in data of a peer, a guest, an image or a log are neutralised in all output."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import logging
import pkgutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

import pageferry
from pageferry.cli.logging_setup import configure_logging
from pageferry.cli.main import main
from pageferry.errors import PageferryError, PeerRefused, UsageError, WorkloadError
from pageferry.events import Event
from pageferry.images.metadata import Metadata, RegionInfo
from pageferry.report.event_log import EventLog, header
from pageferry.report.text import HumanReporter, PlainView, _Console
from pageferry.workloads.qemu.cpu import Cpu
from pageferry.workloads.qemu.machine import Machine
from tests.kernel import images
from tests.kernel.images import Maker
from tests.logs import MAKERS

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202eevil\u2066\u200b\rover"
RAW = [*"\x1b\x07\x9b\x7f\u202e\u2066\u200b\r"]


def assert_clean(text: str) -> None:
    assert [character for character in RAW if character in text] == []


@pytest.fixture
def hostile_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of an image whose metadata contains terminal escapes."""
    kind = Metadata
    changes = {"name": HOSTILE, "details": {HOSTILE: HOSTILE}}
    monkeypatch.setattr(images, "Metadata", lambda **fields: kind(**(fields | changes)))
    named = functools.partial(RegionInfo, name=HOSTILE)
    monkeypatch.setattr(images, "RegionInfo", lambda **fields: named(length=fields["length"], page_size=4096))
    return Maker(16).write(tmp_path / "image")


@pytest.mark.parametrize("output", ["human", "json"])
def test_image_is_shown_without_its_escapes(
    hostile_image: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["image", "info", str(hostile_image), "--output", output]) == 0
    shown = capsys.readouterr().out
    assert_clean(shown)
    assert "owned" in shown
    if output == "json":
        assert HOSTILE in json.dumps(json.loads(shown), ensure_ascii=False) or _contains(json.loads(shown), HOSTILE)


def test_errors_are_shown_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "info", f"/none/{HOSTILE}"]) != 0
    assert_clean(capsys.readouterr().err)


def test_usage_errors_are_shown_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "info", "a", HOSTILE]) == UsageError.exit_code
    assert main([HOSTILE]) == UsageError.exit_code
    assert_clean(capsys.readouterr().err)


def test_traceback_is_shown_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "image", "info", f"/none/{HOSTILE}"]) != 0
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert_clean(shown)


def test_multi_line_error_cannot_forge_messages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "info", "/none/\npageferry: all is well"]) != 0
    assert not any(line.startswith("pageferry: all") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("name", ["pageferry.migration", "qemu.qmp", "other"])
def test_logs_are_shown_without_escapes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, levels = root.handlers, [(logger, logger.level) for logger in (root, logging.getLogger("pageferry"))]
    try:
        configure_logging(True)
        logging.getLogger(name).warning("the peer says %s", HOSTILE)
        try:
            raise RuntimeError(HOSTILE)
        except RuntimeError:
            logging.getLogger(name).exception("failed")
    finally:
        root.handlers = before
        for logger, level in levels:
            logger.setLevel(level)
    shown = capsys.readouterr().err
    assert "owned" in shown
    assert_clean(shown)


def test_error_in_python_has_no_escapes() -> None:
    assert_clean(str(PeerRefused(HOSTILE)))
    assert_clean(str(UsageError(HOSTILE)))


def test_error_about_incompatible_source_has_no_escapes() -> None:
    machine = Machine("7.2.0", "pc", (1,), (), Cpu("qemu64", "", ""))
    with pytest.raises(WorkloadError, match="owned") as refused:
        machine.check_source({"machine": HOSTILE}, "the source", "web")
    assert_clean(str(refused.value))


@pytest.mark.parametrize("terminal", [False, True])
def test_views_show_records_without_their_escapes(terminal: bool) -> None:
    """Every event of the package is shown in every view, with escapes in all text fields."""
    shown: dict[str, int] = {}
    records = [_hostile(kind) for kind in _kinds(Event)]
    views: list[Any] = [PlainView, *_kinds(PlainView)]
    for view in views:
        for record in records:
            data, progress = (
                _Console(file=io.StringIO(), width=200, color_system=None, force_terminal=terminal) for _ in range(2)
            )
            with contextlib.suppress(Exception):  # the view does not support the record
                made = view([]) if view.__name__ == "RunsView" else view()
                reporter = HumanReporter(made, data=data, progress=progress)
                with contextlib.suppress(Exception):
                    reporter.event(record)
                reporter.final(record)
            text = _text(data) + _text(progress)
            for character in RAW[1:] if terminal else RAW:  # on a terminal, rich moves the cursor with ESC and CR
                assert character == "\r" or character not in text, (view, record)
            assert "\x1b]0;owned" not in text
            shown[view.__name__] = shown.get(view.__name__, 0) + ("owned" in text)
    shown.pop("RunsView")  # does not show events: see test_reports_have_no_escapes
    assert min(shown.values()) > 0, shown


def test_live_display_does_not_interpret_markup() -> None:
    console = _Console(file=io.StringIO(), width=200, color_system=None, force_terminal=False)
    HumanReporter(PlainView(), data=console, progress=console).final(
        Named(name="[link=http://evil]click[/link]")  # type: ignore[arg-type]
    )
    assert "[link=http://evil]" in _text(console)


@pytest.mark.parametrize("maker", MAKERS)
def test_reports_have_no_escapes(maker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log with escapes in all fields that contain free text is reported in the terminal, as JSON and as HTML."""
    MAKERS[maker](tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    for line in lines:
        for name, value in line.items():
            if name not in ("type", "schema", "verb", "started", "mode", "side") and isinstance(value, str):
                line[name] = value + HOSTILE
        if "arguments" in line:
            line["arguments"] |= {"name": HOSTILE, HOSTILE: HOSTILE}
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for words in ([], ["--output", "json"], ["--html", str(tmp_path / "page.html")]):
        assert main(["report", str(tmp_path / "log"), *words]) == 0
    shown = capsys.readouterr().out
    assert "owned" in shown
    assert_clean(shown)
    page = (tmp_path / "page.html").read_bytes().decode()
    assert "owned" in page
    assert_clean(page)


def test_event_log_has_no_escapes_and_the_same_values(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log", header("list", {"name": HOSTILE}))
    log.end(1, PageferryError(HOSTILE))
    written = (tmp_path / "log").read_bytes().decode()
    assert_clean(written)
    assert json.loads(written.splitlines()[0])["arguments"]["name"] == HOSTILE


class Named(msgspec.Struct):
    """Record with a text field."""

    name: str


def _contains(value: Any, text: str) -> bool:
    if isinstance(value, dict):
        return any(_contains(part, text) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(_contains(part, text) for part in value)
    return isinstance(value, str) and text in value


def _text(console: Any) -> str:
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def _kinds(base: type[Any]) -> list[type[Any]]:
    """Return all classes of the package that derive from `base`."""
    for module in pkgutil.walk_packages(pageferry.__path__, "pageferry."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: list[type[Any]] = []
    waiting = list(base.__subclasses__())
    while waiting:
        kind = waiting.pop(0)
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("pageferry."):
            found.append(kind)
    return found


def _hostile(kind: type[Any], text: str = HOSTILE) -> Any:
    """Return a record of class `kind` with `text` in all text fields."""
    return _sample(msgspec.inspect.type_info(kind), text)


def _sample(kind: Any, text: str) -> Any:
    match kind:
        case msgspec.inspect.StrType():
            return text
        case msgspec.inspect.IntType():
            return 1
        case msgspec.inspect.FloatType():
            return 1.0
        case msgspec.inspect.BoolType():
            return True
        case msgspec.inspect.NoneType():
            return None
        case msgspec.inspect.LiteralType():
            return kind.values[0]
        case msgspec.inspect.UnionType():
            some = [one for one in kind.types if not isinstance(one, msgspec.inspect.NoneType)]
            return _sample(some[0], text)
        case msgspec.inspect.DictType():
            return {_sample(kind.key_type, text): _sample(kind.value_type, text)}
        case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType() | msgspec.inspect.CollectionType():
            return [_sample(kind.item_type, text)]
        case msgspec.inspect.TupleType():
            return tuple(_sample(one, text) for one in kind.item_types)
        case msgspec.inspect.StructType():
            return kind.cls(**{field.name: _sample(field.type, text) for field in kind.fields})
        case _:
            return None
