"""Results that README shows: what stands between `<!-- include: FILE -->` and `<!-- end -->` comes from that file.

Of a file with sections, the first one is shown: what stands before its second heading. Comments and headings are left
out. `python -m benchmarks.measuring.readme` writes README anew.
"""

from __future__ import annotations

import re

from benchmarks.measuring.machine import ROOT

README = ROOT / "README.md"
_INCLUDE = re.compile(r"(<!-- include: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def update() -> None:
    """Write it anew, where a file has changed."""
    before = README.read_text()
    after = included(before)
    if after != before:
        README.write_text(after)


def included(text: str) -> str:
    """The text with every included part as its file has it now; a file that is not there leaves it as it is."""

    def fill(found: re.Match[str]) -> str:
        path = ROOT / found[2]
        return f"{found[1]}{summary(path.read_text())}\n{found[3]}" if path.exists() else found[0]

    return _INCLUDE.sub(fill, text)


def summary(results: str) -> str:
    """What README shows of a file of results."""
    parts = re.split(r"^#+ .*\n", results, flags=re.MULTILINE)
    shown = re.sub(r"<!-- .*? -->\n*", "", "".join(parts[:2]))
    return re.sub(r"\n{3,}", "\n\n", shown).strip()


if __name__ == "__main__":
    update()
