"""Types of arrays as texts, which are read without unpickling."""

from __future__ import annotations

import ast
from typing import Any

from pageferry.errors import UnsupportedError


def numpy_for(user: str) -> Any:
    """Return the module numpy. Raises UnsupportedError if it is not installed."""
    try:
        import numpy
    except ImportError as missing:
        raise UnsupportedError(f"cannot use {user}: numpy is not installed; install it") from missing
    return numpy


def to_text(dtype: Any) -> str:
    """Return a dtype as text: a typestr such as `<f8`, or the fields of a structured dtype."""
    if dtype.names is None:
        return str(dtype.str)
    import numpy

    return repr(numpy.lib.format.dtype_to_descr(dtype))


def to_text_or_dtype(dtype: Any) -> Any:
    """Return a dtype as text if `from_text` returns exactly this dtype, otherwise the dtype itself: a text contains
    neither metadata nor the alignment of a structured type. A pickle of a text refers to no name that `allow` has to
    permit."""
    text = to_text(dtype)
    found = from_text(text)
    same = found == dtype and found.type is dtype.type and found.isalignedstruct == dtype.isalignedstruct
    return text if same and not dtype.metadata and repr(found) == repr(dtype) else dtype


def from_text(text: str) -> Any:
    """Return the dtype with this text. Raises ValueError for an invalid text, and for a type of Python objects."""
    numpy = numpy_for("types of arrays")
    try:
        dtype = numpy.lib.format.descr_to_dtype(ast.literal_eval(text)) if text.startswith("[") else numpy.dtype(text)
    except (TypeError, SyntaxError, MemoryError, RecursionError, IndexError, AttributeError, KeyError) as error:
        raise ValueError(f"invalid type {text[:60]!r}: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"invalid type {text[:60]!r}: it contains Python objects")
    return dtype
