"""Options of operations on stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from pageferry.errors import UsageError
from pageferry.options import Duration, Text, check

MIN_GRACE = 600.0
"""Minimum grace period, seconds. It exceeds `contents.CHECK_AFTER` and the time for the creation of a reference."""
MAX_GRACE = 366 * 86400.0


class KeyArguments(TypedDict, total=False):
    """Keyword arguments of `list_images` for the fields of `KeyOptions`."""

    key: str | Path | None
    key_command: str | None


class OpenArguments(KeyArguments, total=False):
    """Keyword arguments of `pull_image` for the fields of `OpenOptions`."""

    allow_plain: bool


class PushArguments(KeyArguments, total=False):
    """Keyword arguments of `push_image` for the fields of `PushOptions`."""

    reupload: bool


class CollectArguments(TypedDict, total=False):
    """Keyword arguments of `collect_garbage` for the fields of `CollectOptions`."""

    grace: float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyOptions:
    """Keys of encrypted images in stores. Raises UsageError."""

    key: Path | None = None
    """File with the key of an image in a store: a raw key of 256 bits (32 bytes or 64 hexadecimal digits), or lines
    with age identities and recipients; see docs/stores.md."""
    key_command: Annotated[str | None, Text(metavar="COMMAND")] = None
    """Command that prints what a file for `key` contains. It is run for each image, without a shell."""

    def __post_init__(self) -> None:
        check(self)
        if self.key is not None and self.key_command is not None:
            raise UsageError("`key` cannot be combined with `key_command`: remove one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions(KeyOptions):
    """Keys for reading images in stores. Raises UsageError."""

    allow_plain: bool = False
    """With a key, also accept an image that is not encrypted."""

    def __post_init__(self) -> None:
        KeyOptions.__post_init__(self)
        if self.allow_plain and self.key is None and self.key_command is None:
            raise UsageError("`allow_plain` has no effect without `key` or `key_command`; remove it")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions(KeyOptions):
    """Options of `push_image`. Raises UsageError."""

    reupload: bool = False
    """Upload all contents, also those that the store has, because objects of the store are damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """Options of `collect_garbage`. Raises UsageError."""

    grace: Annotated[float, Duration(MIN_GRACE, MAX_GRACE)] = 86400.0
    """Keep an unneeded object for this time before it is marked, and again before it is deleted."""

    def __post_init__(self) -> None:
        check(self)
