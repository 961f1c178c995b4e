"""Tests that no file has more discouraged phrases than `scripts/wording.json` permits."""

import subprocess
from pathlib import Path

import pytest

from scripts import wording


def test_no_file_has_more_hits_than_the_table_allows() -> None:
    if subprocess.run(["git", "rev-parse"], cwd=wording.ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout: unknown files")
    assert [f"{path}: {list(wording.hits(path))}" for path in wording.grown()] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("# Nobody reads it.", True),
        ('    """What a caller passes."""', True),
        ("def test_nothing_is_lost() -> None:", True),
        ("The pager loads the page.", False),
        ("There is no such file.", False),
    ],
)
def test_phrases_are_found_in_a_line(line: str, found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "sample.md"
    file.write_text(line + "\n")
    monkeypatch.setattr(wording, "ROOT", file.parent)
    assert any(wording.hits("sample.md")) is found
