"""Tests of the command line: parsing, lazy imports, output, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pageferry.cli.main import main
from pageferry.cli.parser import build_parser
from pageferry.cli.verbs import VERBS, Verb

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-W", "error", "-m", "tests.unit.verbs.command"]


@pytest.fixture(autouse=True)
def verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "lister", Verb("tests.unit.verbs.lister", "List [some] steps."))
    monkeypatch.setitem(VERBS, "sleeper", Verb("tests.unit.verbs.sleeper", "Sleep."))


def run_command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        cwd=ROOT,
        env={"PATH": "/usr/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_verb_decides_exit_code() -> None:
    assert main(["lister"]) == 0
    assert main(["lister", "seven"]) == 7
    assert main(["sleeper", "--seconds", "0"]) == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "pageferry: error: the following arguments are required: VERB (see `pageferry --help`)"),
        (["no-such-verb"], "pageferry: error: argument VERB: invalid choice: 'no-such-verb', expected one of check, "),
        (
            ["--out", "json", "lister"],
            "pageferry: error: argument VERB: invalid choice: 'json', expected one of check, ",
        ),
        (["lister", "--no-such-option"], "pageferry lister: error: unrecognized arguments: --no-such-option ("),
        (
            ["sleeper", "--", "true"],
            "pageferry sleeper: error: this verb does not take a command after --; remove it (",
        ),
        (["image", "info", "x", "y"], "pageferry image info: error: unrecognized arguments: y ("),
    ],
)
def test_usage_error_exits_with_2_and_prints_one_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(says)


def test_options_of_every_verb_may_come_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_bytes(b"no image")
    assert main(["image", "verify", str(tmp_path / "x"), "--output", "json"]) == 31
    assert "has no index" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("UsageError", 2), ("NoSuchWorkload", 11), ("OutcomeUnknown", 26)])
def test_pageferry_error_is_one_line(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lister", "--fail", name]) == code
    assert capsys.readouterr().err.splitlines()[-1] == "pageferry: error: told to fail"


def test_unexpected_error_shows_a_traceback_only_with_debug(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lister", "--fail", "surprise"]) == 1
    short = capsys.readouterr().err
    assert "Traceback" not in short
    assert "RuntimeError: told to fail" in short
    assert "--debug" in short
    assert main(["lister", "--fail", "surprise", "--debug"]) == 1
    assert "lister.py" in capsys.readouterr().err


def test_json_is_one_object_per_line_before_or_after_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    expected = [{"type": "step", "number": 0}, {"type": "step", "number": 1}, {"type": "total", "steps": 2}]
    for words in (["lister", "--steps", "2", "--output", "json"], ["--output", "json", "lister", "--steps", "2"]):
        assert main(words) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected


def test_data_on_stdout_progress_and_logs_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lister", "--steps", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == ["steps", "2"]
    assert err.splitlines() == ["listing 2", "step: number 0", "step: number 1"]


def test_debug_logs_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "lister"]) == 0
    assert "pageferry.verbs: pid" in capsys.readouterr().err


def test_only_the_requested_verb_is_imported() -> None:
    program = (
        "import sys; from tests.unit.verbs import command; command.main({words!r});"
        "print('loaded', *(m for m in sys.modules if m in ('tests.unit.verbs.lister', 'tests.unit.verbs.sleeper')))"
    )
    for words, loaded in ((["--help"], []), (["sleeper", "--seconds", "0"], ["tests.unit.verbs.sleeper"])):
        code = program.format(words=words)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1].split() == ["loaded", *loaded], done.stderr


def test_help_lists_verbs_literally(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "List [some] steps." in capsys.readouterr().out


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pageferry 0.")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_options_of_all_verbs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--completion={shell}"]) == 0
    script = capsys.readouterr().out
    assert "--steps" in script
    assert "--then" in script


def test_completion_for_bash_is_a_script() -> None:
    script = run_command("--completion", "bash").stdout
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=60)


def test_words_after_two_dashes_are_the_command_of_the_workload() -> None:
    words = ["lister", "--output", "json", "--", "qemu", "--output", "x", "--help"]
    assert build_parser(words).parse_args(words).words == ["qemu", "--output", "x", "--help"]


def test_every_verb_can_be_configured() -> None:
    build_parser(["--completion", *VERBS])


def test_no_color_is_honoured() -> None:
    coloured = run_command("--help", FORCE_COLOR="1", TERM="xterm").stdout
    plain = run_command("--help", FORCE_COLOR="1", NO_COLOR="1", TERM="xterm").stdout
    assert "\x1b[3" in coloured
    assert "\x1b[3" not in plain
