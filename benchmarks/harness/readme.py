"""Copies of results in README: the text between `<!-- include: FILE -->` and `<!-- end -->` is taken from FILE.

If FILE has sections, only the first section is included. Comments and headings are left out. `python -m
benchmarks.harness.readme` updates README.
"""

from __future__ import annotations

import re

from benchmarks.harness.machine import ROOT

README = ROOT / "README.md"
_INCLUDE = re.compile(r"(<!-- include: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def update() -> None:
    """Update README if an included file has changed."""
    before = README.read_text()
    after = included(before)
    if after != before:
        README.write_text(after)


def included(text: str) -> str:
    """Return the text with each included part replaced. Parts whose file does not exist are not changed."""

    def fill(found: re.Match[str]) -> str:
        path = ROOT / found[2]
        return f"{found[1]}{summary(path.read_text())}\n{found[3]}" if path.exists() else found[0]

    return _INCLUDE.sub(fill, text)


def summary(results: str) -> str:
    """Return the part of a result file that README includes."""
    parts = re.split(r"^#+ .*\n", results, flags=re.MULTILINE)
    shown = re.sub(r"<!-- .*? -->\n*", "", "".join(parts[:2]))
    return re.sub(r"\n{3,}", "\n\n", shown).strip()


if __name__ == "__main__":
    update()
