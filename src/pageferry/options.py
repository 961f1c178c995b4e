"""Options of operations: dataclasses whose fields declare how a value is checked, parsed and shown.

::

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        timeout: Annotated[float, Duration(0.1, 3600.0), "connection"] = 30.0
        '''Fail when the peer has been silent for this time.'''

        def __post_init__(self) -> None:
            check(self)

The command line provides one option per field (`pageferry.cli.options`). Its name, default and choices are those of the
field, and its help is the docstring of the field. A text in the annotation is the heading under which `--help` lists
the option. Fields of type bool, str, Path or Literal require no `Kind` in the annotation. A field marked `API_ONLY` is
not an option of the command.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import msgspec

from pageferry import values
from pageferry.errors import UsageError

API_ONLY = object()
"""Marker of a field that the command line does not set."""


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """Kind of a value. Subclasses check values of the Python API, and parse arguments of the command line."""

    placeholder: ClassVar[str] = "TEXT"
    """Placeholder of the value in the help, unless `metavar` is set."""

    metavar: str | None = None
    unset: str | None = None
    """Meaning of the default None, for the help."""

    @property
    def note(self) -> str:
        """Remark on the values, for the help."""
        return ""

    def check(self, name: str, value: object) -> Any:
        """Check a value of the option `name`, and return it converted to the option's type. Raises UsageError."""
        raise NotImplementedError

    def parse(self, text: str) -> Any:
        """Parse an argument of the command line; its range is checked later. Raises UsageError."""
        return text

    def show(self, value: Any) -> str:
        """Return a default value in a form that `parse` accepts."""
        return str(value)


class Duration(Kind, frozen=True):
    """Seconds, or a text such as `30ms`."""

    placeholder = "DURATION"

    least: float
    most: float
    plain: float = 1.0
    """Seconds per unit of a plain number on the command line."""

    @property
    def note(self) -> str:
        """Unit of plain numbers."""
        return f"a plain number is in {'seconds' if self.plain == 1.0 else 'milliseconds'}"

    def check(self, name: str, value: object) -> float:
        """Check a duration, and return it in seconds. Raises UsageError."""
        return values.duration(name, value, self.least, self.most)

    def parse(self, text: str) -> float:
        """Parse a duration, and return it in seconds. Raises UsageError."""
        return values.parse_duration(text, self.plain)

    def show(self, value: float) -> str:
        """Return a duration as a text with a unit."""
        return values.duration_text(value)


class Size(Kind, frozen=True):
    """Bytes, or a text such as `64K`."""

    placeholder = "SIZE"

    least: int
    most: int

    def check(self, name: str, value: object) -> int:
        """Check a size, and return it in bytes. Raises UsageError."""
        return values.size(name, value, self.least, self.most)

    def parse(self, text: str) -> int:
        """Parse a size, and return it in bytes. Raises UsageError."""
        return values.parse_size(text)

    def show(self, value: int) -> str:
        """Return a size as a text with a unit."""
        return values.size_text(value)


class Rate(Kind, frozen=True):
    """Bytes per second, or a text such as `100M`; 0 for no limit."""

    placeholder = "SIZE"

    def check(self, name: str, value: object) -> int:
        """Check a rate, and return it in bytes per second. Raises UsageError."""
        return values.rate(name, value)

    def parse(self, text: str) -> int:
        """Parse a rate, and return it in bytes per second. Raises UsageError."""
        return values.parse_rate(text)

    def show(self, value: int) -> str:
        """Return a rate as a text with a unit; `unlimited` for 0."""
        return values.size_text(value) if value else "unlimited"


class Fraction(Kind, frozen=True):
    """A fraction greater than 0, or a text such as `5%`. With `zero`, 0 is valid too."""

    placeholder = "FRACTION"

    most: float = 1.0
    zero: bool = False

    def check(self, name: str, value: object) -> float:
        """Check a fraction, and return it as a fraction of 1. Raises UsageError."""
        return 0.0 if self.zero and value == 0 else values.fraction(name, value, self.most)

    def parse(self, text: str) -> float:
        """Parse a percentage or a number, and return a fraction of 1. Raises UsageError."""
        return values.parse_fraction(text)


class Count(Kind, frozen=True):
    """An integer in a range."""

    placeholder = "N"

    least: int
    most: int

    def check(self, name: str, value: object) -> int:
        """Check an integer, and return it. Raises UsageError."""
        return values.count(name, value, self.least, self.most)

    def parse(self, text: str) -> int:
        """Parse an integer. Raises UsageError."""
        return parse_integer(text)


class Flag(Kind, frozen=True):
    """A boolean."""

    def check(self, name: str, value: object) -> bool:
        """Check a boolean, and return it. Raises UsageError."""
        return values.flag(name, value)


class Choice(Kind, frozen=True):
    """One of several words."""

    choices: tuple[str, ...]

    def check(self, name: str, value: object) -> str:
        """Check that the value is one of the words, and return it. Raises UsageError."""
        return values.choice(name, value, self.choices)


class Place(Kind, frozen=True):
    """A word with or without a directory, such as `copy:DIR`. `forms`: see `values.placed`."""

    placeholder = "MODE"

    forms: tuple[str, ...]

    def check(self, name: str, value: object) -> values.Placed:
        """Check the word and its directory, and return both. Raises UsageError."""
        return values.placed(name, value, self.forms)


class Text(Kind, frozen=True):
    """A text that is not empty."""

    def check(self, name: str, value: object) -> str:
        """Check that the value is a text that is not empty, and return it. Raises UsageError."""
        return values.text(name, value)


class Texts(Kind, frozen=True):
    """Several texts; the option can be repeated."""

    def check(self, name: str, value: object) -> tuple[str, ...]:
        """Check a sequence of texts, and return it as a tuple. Raises UsageError."""
        return values.texts(name, value)


class PathName(Kind, frozen=True):
    """A path, given as a string or a path object."""

    placeholder = "FILE"

    def check(self, name: str, value: object) -> Path:
        """Check a path, and return it as a `Path`. Raises UsageError."""
        return values.path(name, value)


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """Field of a dataclass of options."""

    name: str
    kind: Kind
    default: Any
    optional: bool
    """Whether None is a valid value."""
    group: str | None
    api_only: bool


def options_of(kind: type) -> tuple[Option, ...]:
    """Return the options of a dataclass, in the order of its fields."""
    if kind not in _KNOWN:
        _KNOWN[kind] = tuple(_options(kind))
    return _KNOWN[kind]


def check(options: Any) -> None:
    """Check the value of every field, and replace it by the checked form. Raises UsageError."""
    for option in options_of(type(options)):
        value = getattr(options, option.name)
        if value is not None or not option.optional:
            object.__setattr__(options, option.name, option.kind.check(option.name, value))


def parse_integer(text: str) -> int:
    """Parse an integer. Raises UsageError."""
    if not text.isascii() or len(text) > 20 or not text.lstrip("+-").isdigit():
        raise UsageError(f"invalid number {text!r}: expected an integer")
    return int(text)


_KNOWN: dict[type, tuple[Option, ...]] = {}
"""Cache of options by class: resolving annotations takes longer than checking values."""


def _options(kind: type) -> Iterator[Option]:
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        annotated, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        types = [one for one in _alternatives(annotated) if one is not NoneType]
        given = next((mark for mark in marks if isinstance(mark, Kind)), None)
        yield Option(
            name=field.name,
            kind=given or _kind_of(types[0]),
            default=field.default,
            optional=len(types) < len(_alternatives(annotated)),
            group=next((mark for mark in marks if isinstance(mark, str)), None),
            api_only=API_ONLY in marks,
        )


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the single type."""
    return (annotation,) if get_origin(annotation) in (Literal, None) else get_args(annotation)


def _kind_of(annotation: Any) -> Kind:
    if get_origin(annotation) is Literal:
        return Choice(get_args(annotation))
    return {bool: Flag(), str: Text(), Path: PathName()}[annotation]
