"""Docstrings of fields: texts below the annotations of a class. They exist only in the source of the class."""

from __future__ import annotations

import ast
import inspect
import textwrap


def field_docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings of the fields of a class of pageferry and of its bases, by field name."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if one.__module__.startswith("pageferry."):
            found.update(_of(one))
    return found


def _of(kind: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        one.target.id: " ".join(str(ast.literal_eval(after.value)).split())
        for one, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr)
    }
