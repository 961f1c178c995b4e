"""mkdocs extension that hides the `::` before indented blocks in docstrings."""

from __future__ import annotations

from typing import Any

import griffe


class LiteralBlocks(griffe.Extension):
    """Extension that removes the marks of literal blocks from all docstrings."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Remove the marks from the docstring of an object, if it has one. griffe calls this method for each object."""
        if obj.docstring is not None:
            lines = obj.docstring.value.splitlines()
            obj.docstring.value = "\n".join(_shown(line) for line in lines if line.strip() != "::")


def _shown(line: str) -> str:
    return line[:-1] if line.endswith("::") else line
