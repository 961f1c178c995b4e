"""Programs that use the public interface pass `mypy --strict`, and mistakes in them are reported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.use.hosts import ROOT

PROGRAM = Path(__file__).parent / "typed_program.py"
MISTAKES = """
import pageferry
arena = pageferry.Arena("1MiB", on_pauses=None)
pageferry.checkpoint(arena, "image", bandwith=1)
pageferry.checkpoint(arena, "image", codec="gzip")
pageferry.migrate(arena, "host:1", streams="many")
pageferry.receive("host:1", on_pause=1)
pageferry.restore("image", memory="shared").resize(1)
result: int = pageferry.restore("image")
"""


def check(*paths: Path, cache: Path) -> str:
    """Return the messages of `mypy --strict`."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(cache)]
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    done = subprocess.run([*command, *paths], capture_output=True, text=True, cwd="/", env=environment, check=False)
    assert done.stderr == ""
    return done.stdout


def test_program_is_correct_and_mistakes_are_reported(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(MISTAKES)
    said = check(PROGRAM, wrong, cache=tmp_path / "cache")
    lines = {int(line) for line in re.findall(r"wrong\.py:(\d+): error", said)}
    assert lines == set(range(3, MISTAKES.count("\n") + 1)), said
    assert PROGRAM.name not in said, said


def test_program_runs(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(PROGRAM), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "ferryboat True True 0 arena\n", done.stdout + done.stderr
