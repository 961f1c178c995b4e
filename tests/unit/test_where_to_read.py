"""Tests that functions named in the documentation of the systems exist in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ENGINE = ROOT / "crates" / "engine" / "src"
PAGES = sorted((ROOT / "docs" / "systems").glob("*.md"))
NAME = re.compile(r"`(pageferry(?:\.\w+)+|[\w/]+\.rs::\w+)`")


def section(page: Path) -> str:
    """Return the section `Where to read it` of a page."""
    return page.read_text().split("\n## Where to read it\n")[1].split("\n## ")[0]


def defined(tree: ast.Module | ast.ClassDef, names: list[str]) -> bool:
    """Return whether a module or class defines `names[0]`, and, if there are more names, that class defines them."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == names[0]:
            return len(names) == 1 or (isinstance(node, ast.ClassDef) and defined(node, names[1:]))
    return False


def python_exists(name: str) -> bool:
    """Return whether src defines `package.module.function` or `package.module.Class.method`."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = (ROOT / "src").joinpath(*parts[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file() and defined(ast.parse(file.read_text()), parts[length:]):
                return True
    return False


def rust_exists(name: str) -> bool:
    """Return whether a file of the engine defines a function, given as `directory/file.rs::function`."""
    file, function = name.split("::")
    path = ENGINE / file
    return path.is_file() and re.search(rf"\bfn {function}\b", path.read_text()) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_functions_of_a_system_exist(page: Path) -> None:
    names = NAME.findall(section(page))
    assert len(names) >= 5
    missing = [name for name in names if not (rust_exists(name) if "::" in name else python_exists(name))]
    assert not missing, f"{page.name} names functions that do not exist: {missing}"


def test_architecture_names_existing_functions() -> None:
    names = NAME.findall((ROOT / "docs" / "architecture.md").read_text())
    assert len(names) >= 20
    missing = [name for name in names if not (rust_exists(name) if "::" in name else python_exists(name))]
    assert not missing
