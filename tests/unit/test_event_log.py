"""Tests of event logs: contents, and reading of damaged logs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pageferry.cli.main import main
from pageferry.cli.verbs import VERBS, Verb
from pageferry.errors import UsageError
from pageferry.events import SCHEMA, Event
from pageferry.fleet.model import Plan
from pageferry.report.event_log import EventLog, Log, header
from scripts import events as page
from tests.unit.verbs.lister import Step, Total

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "lister", Verb("tests.unit.verbs.lister", "List [some] steps."))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_has_header_events_result_and_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    assert main(["lister", "--steps", "2", "--log", str(path), "--output", "json", "seven"]) == 7
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first, *between, last = lines(path)
    assert first["type"] == "log"
    assert (first["schema"], first["verb"], first["arguments"]["steps"]) == (SCHEMA, "lister", 2)
    assert [{name: value for name, value in line.items() if name != "at-ms"} for line in between] == told
    assert (last["type"], last["exit-code"], last["error"]) == ("end", 7, None)
    times = [line["at-ms"] for line in lines(path)]
    assert times == sorted(times)
    assert path.stat().st_mode & 0o77 == 0


def test_error_is_recorded_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert main(["lister", "--fail", "NoSuchWorkload", "--log", str(path)]) == 11
    log = Log.read(path)
    assert log.lines == []
    assert log.end is not None
    assert (log.end.exit_code, log.end.error, log.end.message) == (11, "NoSuchWorkload", "told to fail")


def test_log_that_cannot_be_opened_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lister", "--log", str(tmp_path / "no" / "such")]) == 2
    assert "--log" in capsys.readouterr().err


def test_command_continues_without_a_full_log(tmp_path: Path) -> None:
    words = ["lister", "--steps", "3", "--log", str(tmp_path / "log")]
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (64, -1));"
        f"from tests.unit.verbs.command import main; sys.exit(main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cannot write the event log: File too large" in done.stderr


def test_secrets_and_guest_arguments_are_not_logged() -> None:
    given = {"name": "web", "tls_password": "abc", "psk": None, "command": ["qemu", "-x", "secret"], "run": main}
    assert header("run", given).arguments == {
        "name": "web",
        "tls_password": "(hidden)",
        "psk": None,
        "command": ["qemu", "(2 arguments)"],
    }


def test_killed_command_leaves_all_emitted_events(tmp_path: Path) -> None:
    path = tmp_path / "log"
    options = ["--steps", "3", "--linger", "--log", str(path)]
    command = [sys.executable, "-m", "tests.unit.verbs.command", "lister", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"asleep\n"
        child.send_signal(signal.SIGKILL)
    log = Log.read(path)
    assert [line.to(Step).number for line in log.lines] == [0, 1, 2]
    assert log.end is None
    assert not log.cut


def test_truncated_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EventLog(path, header("lister", {}))
    log.event(Step(1))
    log.event(Total(1))
    log.end(0)
    whole = path.read_bytes()
    starts = [0] + [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(starts[1], len(whole) + 1):
        path.write_bytes(whole[:length])
        read = Log.read(path)
        complete = sum(start <= length for start in starts) - 1
        assert len(read.lines) == min(complete, 3) - 1
        assert (read.end is not None) == (complete == 4)
        assert read.cut == (length not in starts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello\n",
        "[1]\n",
        '{"type": "log"}\n',
        '{"at-ms": 1, "type": "step"}\n',
        '{"at-ms": 0, "type": "log", "schema": 99}\n',
        '{"at-ms": "x", "type": "log"}\n',
        '{"at-ms": 0, "type": "log", "schema": 1}\n',
    ],
)
def test_invalid_logs_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(UsageError, match=str(path)):
        Log.read(path)


def test_documentation_describes_every_event() -> None:
    text = page.page()
    assert all(f"## `{tag}`\n\n" in text and event.__doc__ for tag, event in page.events().items())


def test_events_are_defined_in_modules_of_that_name() -> None:
    # The plan of a fleet is a record of the planner too, and is defined beside the other records of the planner.
    others = [event for event in page.events().values() if event is not Plan]
    assert {event.__module__.rpartition(".")[2] for event in others} == {"events"}


def test_event_tags_are_unique_and_reserved_keys_unused() -> None:
    for tag, event in page.events().items():
        assert issubclass(event, Event), tag
        assert not {"at-ms", "type"} & set(event.__struct_encode_fields__), tag
