"""Options of verbs, derived from the fields of dataclasses (`pageferry.options`)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from pageferry.cli.parser import Parser
from pageferry.errors import UsageError
from pageferry.options import Choice, Flag, Option, Texts, options_of

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser, kind: type, *, without: Collection[str] = ()) -> None:
    """Add an option to the parser for each field of a dataclass, in the argument group that the field names. `without`:
    names of fields that do not apply to the verb."""
    texts = _docstrings(kind) if not isinstance(parser, Parser) or parser.described else {}
    groups: dict[str | None, argparse._ActionsContainer] = {None: parser}
    for option in options_of(kind):
        if option.api_only or option.name in without:
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        groups[option.group].add_argument(
            f"--{option.name.replace('_', '-')}",
            help=_help(option, texts.get(option.name, ""), texts),
            **_arguments(option),
        )


def _docstrings(kind: type) -> dict[str, str]:
    from pageferry.docstrings import field_docstrings  # parses source

    return field_docstrings(kind)


def given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Return the values of the options that `add_options` has added for the dataclass `kind`, by the name of the
    field."""
    names = [option.name for option in options_of(kind) if not option.api_only]
    return {name: getattr(args, name) for name in names if name in args}


def refuse(args: argparse.Namespace, names: Collection[str], cause: str) -> None:
    """Raise UsageError if one of these arguments, which the verb would ignore, was given. `cause`: end of the error
    message, such as `without --watch`."""
    _refuse([text for name, text in _given(args).items() if name in names], cause)


def refuse_others(args: argparse.Namespace, names: Collection[str], cause: str) -> None:
    """Raise UsageError if an argument other than these, or the command line of a program, was given. `cause`: as for
    `refuse`."""
    others = [text for name, text in _given(args).items() if name not in names]
    _refuse([*others, *(["the command after --"] if args.command else [])], cause)


def _given(args: argparse.Namespace) -> dict[str, str]:
    found: dict[str, str] = args.usage_error.__self__.given(args)
    return found


def _refuse(ignored: list[str], cause: str) -> None:
    if ignored:
        verb, them = ("has", "it") if len(ignored) == 1 else ("have", "them")
        raise UsageError(f"{', '.join(ignored)} {verb} no effect {cause}; remove {them}")


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Convert a parser to an argument type of argparse. Its UsageError becomes ArgumentTypeError, to which argparse
    adds the name of the option."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _arguments(option: Option) -> dict[str, Any]:
    metavar = option.kind.metavar or option.kind.placeholder
    match option.kind:
        case Flag() if option.optional:
            return {"action": argparse.BooleanOptionalAction, "default": option.default}
        case Flag():
            return {"action": "store_true"}
        case Choice(choices=choices):
            return {"choices": choices, "default": option.default}
        case Texts():
            return {"action": "append", "metavar": metavar, "default": []}
        case kind:
            return {"type": argument(kind.parse), "metavar": metavar, "default": option.default}


def _help(option: Option, docstring: str, names: Collection[str]) -> str:
    text = re.sub(r"`([a-z_0-9]+)`", lambda word: _plain(word[1], names), docstring).removesuffix(".")
    if text[1:2].islower() or text[1:2] == " ":
        text = text[:1].lower() + text[1:]
    if option.kind.note:
        text += f"; {option.kind.note}"
    default = _default(option)
    return (text + (f" (default: {default})" if default else "")).replace("%", "%%")


def _default(option: Option) -> str | None:
    """Return the text of the default value for the help; None if the help prints no default, as for flags."""
    if option.default in (None, ()):
        return option.kind.unset
    return None if isinstance(option.kind, Flag) else option.kind.show(option.default)


def _plain(word: str, names: Collection[str]) -> str:
    """Return a word of a docstring as it is printed in the help: the option if it is the name of a field, otherwise the
    word."""
    return _flag(word) if word in names else word


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
