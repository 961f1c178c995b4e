"""Tests that no function has more than 40 lines, unless a comment states the reason."""

from __future__ import annotations

from pathlib import Path

from scripts import function_length


def test_no_function_is_long_without_a_reason() -> None:
    assert list(function_length.found()) == []


def test_long_functions_are_found_unless_they_state_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    body = "    pass\n" * 40
    path.write_text(
        f"def long():\n{body}\n\ndef table():  # over 40 lines: a table\n{body}\n\ndef short():\n    pass\n"
    )
    assert list(function_length.long_functions(path)) == [(1, "long", 41)]


def test_examples_in_a_docstring_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    examples = "        >>> 1\n        1\n" * 20
    path.write_text(f'def call():\n    """Return 1.\n\n    Examples:\n{examples}    """\n    return 1\n')
    assert list(function_length.long_functions(path)) == []
