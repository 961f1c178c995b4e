"""Print functions of more than 40 lines in src/pageferry and benchmarks; `make lint` runs this script.

A function that is long because it contains a table or a record states this in a comment on its first line or on the
line above::

    def tables(results: Results) -> list[str]:  # over 40 lines: a table
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src/pageferry", "benchmarks")
MAX_LINES = 40
"""Maximum number of lines of a function, with signature and docstring, without the examples in the docstring."""
REASON = "# over 40 lines: "

LATER: set[str] = set()
"""Files with long functions that are tolerated until they are divided."""


def long_functions(path: Path) -> Iterator[tuple[int, str, int]]:
    """Yield first line, name and number of lines of each function that exceeds `MAX_LINES` without a stated reason."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - _examples(node)
            if length > MAX_LINES and not any(REASON in line for line in lines[node.lineno - 2 : node.body[0].lineno]):
                yield node.lineno, node.name, length


def _examples(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of the examples at the end of a docstring."""
    _, heading, examples = (ast.get_docstring(node) or "").partition("\nExamples:\n")
    return len((heading + examples).splitlines())


def found() -> Iterator[str]:
    """Yield a message for each function that is too long, except in the files of `LATER`."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            for line, function, length in long_functions(path) if name not in LATER else ():
                yield f"{name}:{line}: {function} has {length} lines, more than {MAX_LINES}: divide it"


if __name__ == "__main__":
    messages = list(found())
    print("\n".join(messages))
    sys.exit(1 if messages else 0)
