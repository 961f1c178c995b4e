"""Tests of the wording: discouraged phrases (see `scripts/wording.py`), and docstrings of properties."""

import ast
import subprocess
from collections.abc import Iterator
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


def test_docstrings_of_properties_are_noun_phrases() -> None:
    package = wording.ROOT / "src" / "pageferry"
    files = [path for ending in ("*.py", "*.pyi") for path in package.rglob(ending)]
    assert [f"{path}:{line}" for path in files for line in _properties_that_begin_as_functions(path.read_text())] == []


def test_property_whose_docstring_is_that_of_a_function_is_found() -> None:
    code = "class A:\n    @{}\n    def b(self) -> int:\n        '{} the size.'\n"
    assert list(_properties_that_begin_as_functions(code.format("cached_property", "Return"))) == [3]
    assert list(_properties_that_begin_as_functions(code.format("classmethod", "Return"))) == []
    assert list(_properties_that_begin_as_functions(code.format("property", "Size in bytes, not"))) == []


def _properties_that_begin_as_functions(code: str) -> Iterator[int]:
    """Yield the line of each property whose docstring begins with "Return"."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.FunctionDef):
            continue
        is_property = any(ast.unparse(one).endswith("property") for one in node.decorator_list)
        if is_property and (ast.get_docstring(node) or "").startswith("Return"):
            yield node.lineno
