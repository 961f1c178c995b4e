"""Tests that the documented exit codes match the error classes."""

import re
from collections.abc import Iterator
from pathlib import Path

from pageferry.errors import PageferryError

TABLE = Path(__file__).parent.parent.parent / "docs" / "exit-codes.md"


def descendants(error: type[PageferryError]) -> Iterator[type[PageferryError]]:
    yield error
    for below in error.__subclasses__():
        yield from descendants(below)


def named() -> list[type[PageferryError]]:
    """Return the error classes that define an exit code; the other classes inherit an exit code."""
    ours = [error for error in descendants(PageferryError) if error.__module__ == "pageferry.errors"]
    return [error for error in ours if "exit_code" in vars(error)]


def test_documented_exit_codes_match_the_errors() -> None:
    documented = {
        name: int(code) for code, name in re.findall(r"^\| (\d+) \| (\w+) \|", TABLE.read_text(), re.MULTILINE)
    }
    assert documented == {error.__name__: error.exit_code for error in named()}


def test_no_two_errors_share_an_exit_code() -> None:
    codes = [error.exit_code for error in named()]
    assert len(codes) == len(set(codes))
