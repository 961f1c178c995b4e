"""Checks and parsers of argument values, shared by the Python API and the command line.

A value is a number in the documented unit, or a text such as `30ms`, `10s`, `1.5G` or `5%`. Every check takes the name
of the parameter for its error message. It raises `UsageError`, or for a value of the wrong type `WrongType`, which is
also a `TypeError`. Error messages put names of parameters in backticks; the command line replaces these names by
options (`pageferry.cli.execution`).
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pageferry.errors import UsageError, WrongType

T = TypeVar("T")

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTES = {suffix: 1 << 10 * power for power, suffix in enumerate("BKMGT")}
_NUMBER = r"(\d+(?:\.\d+)?)\s*"
DURATION = "a number with us, ms, s, m or h, such as 30ms, 10s or 1m"
SIZE = "a number with K, M, G or T, such as 512M or 1.5G"
FRACTION = "a percentage or a number up to 1, such as 5% or 0.05"


# -- parsers of texts


def parse_duration(text: str, unit: float = 1.0) -> float:
    """Parse `30ms`, `10s`, `1m` or `2h`; return seconds. `unit`: seconds per unit of a plain number."""
    match = re.fullmatch(_NUMBER + "(us|ms|s|min|m|h)?", text.strip(), re.ASCII)
    if match is None:
        raise UsageError(f"invalid duration {text!r}: expected {DURATION}")
    return float(match[1]) * (_SECONDS[match[2]] if match[2] else unit)


def parse_size(text: str) -> int:
    """Parse `512`, `64K`, `1.5G` or `2MiB`, with binary units as in QEMU; return bytes."""
    match = re.fullmatch(_NUMBER + "([BKMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None or len(match[1]) > 20:
        raise UsageError(f"invalid size {text!r}: expected {SIZE}")
    return round(float(match[1]) * _BYTES[match[2].upper() or "B"])


def parse_rate(text: str) -> int:
    """Parse a size with or without `/s`; return bytes per second."""
    return parse_size(text.strip().removesuffix("/s"))


def parse_fraction(text: str) -> float:
    """Parse `5%` or `0.05`; return a fraction of 1."""
    match = re.fullmatch(_NUMBER + "(%?)", text.strip(), re.ASCII)
    if match is None:
        raise UsageError(f"invalid fraction {text!r}: expected {FRACTION}")
    return float(match[1]) / (100 if match[2] else 1)


# -- checks of values with a range


def duration(name: str, value: object, least: float, most: float, unit: float = 1.0) -> float:
    """Check a duration: a number of units, or a text such as `30ms`. Return seconds. `unit`: seconds per unit."""
    seconds = _parsed(name, value, lambda text: parse_duration(text, unit))
    if seconds is None:
        seconds = number(name, value, least / unit, most / unit) * unit
    if not least <= seconds <= most:
        raise UsageError(f"invalid `{name}` {value!r}: expected {duration_text(least)} to {duration_text(most)}")
    return seconds


def size(name: str, value: object, least: int, most: int) -> int:
    """Check a size: a number of bytes, or a text such as `512M`. Return bytes."""
    return _bytes(name, value, least, most, parse_size, "bytes")


def rate(name: str, value: object, most: int = 1 << 50) -> int:
    """Check a rate: a number, or a text such as `100M` or `100M/s`. Return bytes per second; 0 is unlimited."""
    return _bytes(name, value, 0, most, parse_rate, "bytes per second")


def fraction(name: str, value: object, most: float = 1.0) -> float:
    """Check a fraction: a number above 0, or a text such as `5%`. Return a fraction of 1."""
    part = _parsed(name, value, parse_fraction)
    if part is None:
        part = number(name, value, 0.0, most)
    if not 0 < part <= most:
        raise UsageError(f"invalid `{name}` {value!r}: expected more than 0, and at most {most:.0%}")
    return part


def number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """Check a real number in a range. NaN, infinity and booleans are invalid."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected a number")
    try:
        real = float(value)
    except OverflowError:
        real = math.inf
    if not least <= real <= most or math.isinf(real):
        raise UsageError(f"invalid `{name}` {_shown(value)}: expected {least:g} to {most:g}")
    return real


def count(name: str, value: object, least: int, most: int) -> int:
    """Check an integer in a range. Booleans are invalid."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected an integer")
    integer = operator.index(value)
    if not least <= integer <= most:
        raise UsageError(f"invalid `{name}` {_shown(value)}: expected {least} to {most}")
    return integer


# -- checks of other values


def flag(name: str, value: object) -> bool:
    """Check a boolean. Other values with a truth value are invalid."""
    if not isinstance(value, bool):
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected True or False")
    return value


def choice(name: str, value: object, choices: Collection[str]) -> str:
    """Check that the value is one of several words."""
    if not isinstance(value, str):
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected one of {', '.join(choices)}")
    if value not in choices:
        raise UsageError(
            f"invalid `{name}` {value!r}: expected one of {', '.join(choices)}{suggestion(value, choices)}"
        )
    return value


def text(name: str, value: object) -> str:
    """Check a text: not empty, without NUL characters."""
    if not isinstance(value, str):
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected a string")
    if not value or "\0" in value:
        raise UsageError(f"invalid `{name}` {value!r}: expected a string that is not empty and has no NUL character")
    return value


def texts(name: str, value: object) -> tuple[str, ...]:
    """Check a sequence of texts. A single text is invalid: it would be interpreted as a sequence of characters."""
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected several strings")
    return tuple(text(name, one) for one in value)


def path(name: str, value: object) -> Path:
    """Check a path, given as a string or a path object. Return a `Path`."""
    if not isinstance(value, str | os.PathLike):
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected a path")
    plain = os.fspath(value)
    if not isinstance(plain, str):
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected a path that is a string")
    return Path(text(name, plain))


def function(name: str, value: T) -> T:
    """Check that the value is callable."""
    if not callable(value):
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected a function")
    return value


def instance(name: str, value: object, *kinds: type[T]) -> T:
    """Check that the value is an instance of one of the classes."""
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected {expected}")
    return value


class Placed(NamedTuple):
    """Word, with the directory that follows it in `WORD:DIR`."""

    word: str
    folder: Path | None = None

    def __str__(self) -> str:
        """Return the text `WORD` or `WORD:DIR`."""
        return self.word if self.folder is None else f"{self.word}:{self.folder}"


def placed(name: str, value: object, forms: Collection[str]) -> Placed:
    """Check a word with or without a directory. `forms`: for each word `WORD` without a directory, `WORD:DIR` with one,
    or `WORD[:DIR]`."""
    if isinstance(value, Placed):
        value = str(value)
    if not isinstance(value, str):
        raise WrongType(f"invalid `{name}` {_shown(value)}: expected {', '.join(forms)}")
    word, separator, folder = value.partition(":")
    for form in forms:
        if form.partition(":")[0].removesuffix("[") == word:
            required, allowed = ":" in form and "[" not in form, ":" in form
            if bool(separator) <= allowed and bool(folder) >= (required or bool(separator)):
                return Placed(word, path(name, folder) if folder else None)
    raise UsageError(f"invalid `{name}` {_shown(value)}: expected {', '.join(forms)}")


def optional(check: Callable[..., T], name: str, value: object, *arguments: Any) -> T | None:
    """Return the value as checked by `check`, or None if it is None."""
    return None if value is None else check(name, value, *arguments)


def options(kind: type[T], given: Mapping[str, Any]) -> T:
    """Return a dataclass of options from keyword arguments. Raises WrongType if an option is unknown."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    for name in given:
        if name not in known:
            raise WrongType(f"unknown option `{name}`: expected {', '.join(known)}{suggestion(name, known)}")
    return kind(**given)


def suggestion(word: str, known: Collection[str]) -> str:
    """Return `; did you mean 'x'?` with a similar known word, or an empty text."""
    import difflib  # needed only for messages

    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _bytes(name: str, value: object, least: int, most: int, parse: Callable[[str], int], unit: str) -> int:
    found = _parsed(name, value, parse)
    if found is None:
        if isinstance(value, float) and value.is_integer():  # such as 1e9
            value = int(value)
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise WrongType(f"invalid `{name}` {_shown(value)}: expected a whole number of {unit}, or {SIZE}")
        found = operator.index(value)
    if not least <= found <= most:
        raise UsageError(f"invalid `{name}` {_shown(value)}: expected {least} to {most} {unit}")
    return found


def _parsed(name: str, value: object, parse: Callable[[str], T]) -> T | None:
    """Parse the value if it is a text; otherwise return None."""
    if not isinstance(value, str):
        return None
    try:
        return parse(value)
    except UsageError as error:
        raise UsageError(f"`{name}`: {error}") from None


def _shown(value: object) -> str:
    """Return a short form of the value for a message."""
    try:
        shown = repr(value)
    except Exception:
        return f"of type {type(value).__name__}"
    return shown if len(shown) <= 60 else f"of type {type(value).__name__}"


def duration_text(seconds: float) -> str:
    """Return a duration in a form that `parse_duration` accepts, in the largest of the units h, s and ms that does not
    exceed the duration; below 1 ms, in s."""
    for unit, factor in (("h", 3600.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:g}{unit}"
    return f"{seconds:g}s"


def size_text(count: int) -> str:
    """Return a number of bytes in a form that `parse_size` accepts, in the largest unit of which it is a multiple."""
    for unit in "TGMK":
        if count and count % _BYTES[unit] == 0:
            return f"{count // _BYTES[unit]}{unit}"
    return str(count)
