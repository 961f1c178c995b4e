"""For the documentation: a docstring's `::` announces the indented block below it, and is not itself shown."""

from __future__ import annotations

from typing import Any

import griffe


class LiteralBlocks(griffe.Extension):
    """Takes the announcement of literal blocks out of every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute, once it has been read."""
        if obj.docstring is not None:
            lines = obj.docstring.value.splitlines()
            obj.docstring.value = "\n".join(_shown(line) for line in lines if line.strip() != "::")


def _shown(line: str) -> str:
    return line[:-1] if line.endswith("::") else line
