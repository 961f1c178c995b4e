"""Tests of the command line in a separate process: signals, closed pipes, terminals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "tests.unit.verbs.command"]
DEADLINE = 60


@contextmanager
def asleep(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command, yield its process once it has printed `asleep`, and kill the process at the end."""
    child = subprocess.Popen(
        [*COMMAND, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "asleep\n"
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("words", [["sleeper"], ["lister", "--sleep"]])
def test_signal_ends_the_verb(words: list[str], number: signal.Signals, code: int) -> None:
    with asleep(*words) as child:
        child.send_signal(number)
        out, err = child.communicate(timeout=DEADLINE)
    assert (child.returncode, err.splitlines()[-1]) == (code, "pageferry: interrupted")
    assert ("cleaned up" in out) == (words == ["sleeper"])


@pytest.mark.parametrize(
    ("then", "code", "message"),
    [("raise", 130, "pageferry: cancelled; the workload runs on\n"), ("finish", 5, "")],
)
def test_cancelled_verb_decides_message_and_exit_code(then: str, code: int, message: str) -> None:
    with asleep("sleeper", "--then", then) as child:
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=DEADLINE)
    assert (child.returncode, err) == (code, message)


def test_second_signal_ends_an_unresponsive_verb() -> None:
    with asleep("sleeper", "--then", "refuse") as child:
        assert child.stdout is not None
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "cleaned up\n"
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=DEADLINE)
    assert child.returncode == 143


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("steps", ["0", "2000"])
def test_closed_reader_is_not_an_error(output: str, steps: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "lister", "--output", output, "--steps", steps]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr.lower()


def test_progress_on_a_terminal_is_replaced_by_the_result() -> None:
    try:
        ours, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"cannot open a pseudo-terminal: {error}")
    command = [*COMMAND, "lister", "--steps", "3"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True
    ) as child:
        os.close(theirs)
        screen = b""
        try:
            while piece := os.read(ours, 4096):
                screen += piece
        except OSError:  # EIO: the last process that had the terminal open has closed it
            pass
        os.close(ours)
        assert child.stdout is not None
        assert child.stdout.read().split() == ["steps", "3"]
    assert child.returncode == 0
    assert b"\x1b[2K" in screen
    assert b"step: number 2" in screen
