"""Examples in the docstrings of public functions and classes, which the reference shows: all of them run."""

from __future__ import annotations

import doctest
import inspect
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pageferry
from pageferry import fleet, large_pages, sharing

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
CLASSES = ("Arena", "Arrays")
QEMU = "qemu-system-x86_64"

DOCUMENTED = [
    pytest.param(inspect.getdoc(function) or "", id=f"{part.__name__}.{name}")
    for part in (pageferry, fleet, large_pages, sharing)
    for name in part.__all__
    if not name.endswith("_async") and (inspect.isroutine(function := getattr(part, name)) or name in CLASSES)
]


@pytest.fixture
def run_directory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a separate run directory, with a short path for sockets, and a separate current directory."""
    with tempfile.TemporaryDirectory(prefix="pf-") as folder:
        monkeypatch.setenv("PAGEFERRY_RUN_DIR", f"{folder}/run")
        monkeypatch.setenv("PAGEFERRY_CACHE_DIR", f"{folder}/cache")
        (work := Path(folder, "work")).mkdir()
        monkeypatch.chdir(work)
        yield


def run(text: str, known: dict[str, Any]) -> str:
    """Run the examples in a text. Return a description of the failures, empty without one."""
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, known, "example", None, 0)
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    return "".join(said)


@pytest.mark.usefixtures("run_directory_of_its_own")
@pytest.mark.parametrize("text", DOCUMENTED)
def test_examples_run(text: str) -> None:
    assert ">>>" in text
    if QEMU in text and shutil.which(QEMU) is None:
        pytest.skip("no QEMU in PATH")
    assert run(text, {}) == ""


def test_wrong_examples_are_reported() -> None:
    assert "Expected:" in run(">>> 1 + 1\n3", {})
