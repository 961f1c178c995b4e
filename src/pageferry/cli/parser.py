"""The parser of the whole command line, of which only the verbs that are asked for are imported."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NoReturn

from rich_argparse import RichHelpFormatter

from pageferry import printable, values
from pageferry.cli.verbs import VERBS
from pageferry.errors import UsageError


class HelpFormatter(RichHelpFormatter):
    """Coloured help whose texts are taken literally: square brackets are ours, not rich's."""

    help_markup = False
    text_markup = False
    group_name_formatter = str.capitalize


class Parser(argparse.ArgumentParser):
    """What the command and all its verbs have in common: no abbreviations, they would freeze the names of options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Of choices, verbs among them: name one that is like the word that was given."""
        if action.choices is not None and value not in action.choices:
            known = list(action.choices)
            meant = values.suggestion(str(value), known)
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}, expected one of {', '.join(known)}{meant}"
            )

    def error(self, message: str) -> NoReturn:
        """One line: a usage of many would hide what is wrong."""
        text = f"{self.prog}: error: {message} (`{self.prog} --help` shows what it takes)"
        self.exit(UsageError.exit_code, f"{printable.message(text)}\n")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments on the command line `words`. Raises SystemExit after help, version, completion or a complaint."""
    # Defaults of shared options come from here: given in parsers, those of the verb's would undo what came before it.
    defaults = argparse.Namespace(output="human", log=None, debug=False, command=[])
    parser = build_parser(words)
    head, command = _split(words)
    args, unknown = parser.parse_known_args(head, defaults)
    _check_separator(args, words)
    if unknown:
        args.complain(f"unrecognized arguments: {' '.join(unknown)}{_meant(args, unknown)}")
    if command and not args.takes_command:
        args.complain("it takes no command after --")
    args.command = command
    return args


def _check_separator(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Report the command line of a QEMU that is not behind `--`."""
    program = next((word for word in words if PurePath(word).name.startswith("qemu-system")), None)
    if args.takes_command and program is not None and "--" not in words:
        args.complain(f"-- is missing in front of {program}: everything after it is the command line of QEMU")


def _meant(args: argparse.Namespace, unknown: Sequence[str]) -> str:
    """Options of the verb that look like the unknown ones."""
    known = args.complain.__self__._option_string_actions
    return "".join(values.suggestion(word.split("=")[0], known) for word in unknown if word.startswith("--"))


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is for us, and the command line of another program after `--`, of which nothing is ours to interpret."""
    if "--" not in words:
        return list(words), []
    end = words.index("--")
    return list(words[:end]), list(words[end + 1 :])


def build_parser(words: Sequence[str]) -> Parser:
    """The parser for the command line `words`.

    All verbs are listed, but only those whose name is among the words are imported and take arguments; one too many
    (a workload called `list`) does no harm. Completion is about all of them.
    """
    shared = shared_options()
    parser = Parser(prog="pageferry", description=_DESCRIPTION, epilog=_EPILOG, parents=[shared])
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=("bash", "zsh"),
        help="print a completion script for this shell and exit",
    )
    completing = any(word.split("=")[0] == "--completion" for word in words)
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        below = verbs.add_parser(name, help=verb.help, description=verb.help, parents=[shared])
        if completing or name in words:
            module = importlib.import_module(verb.module)
            module.configure(below)
            below.set_defaults(
                run=module.run,
                takes_command=getattr(module, "TAKES_COMMAND", False),
                works_on=getattr(module, "WORKS_ON", None),
                complain=below.error,
            )
            if hasattr(module, "WORKS_ON"):
                _add_metrics(below)
    return parser


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("metrics")
    group.add_argument("--metrics", metavar="HOST:PORT", help="answer Prometheus there while it runs (docs/metrics.md)")
    group.add_argument(
        "--metrics-insecure", action="store_true", help="allow addresses other than loopback for that, in the clear"
    )


_DESCRIPTION = "Moves, saves and shapes the memory of running workloads, from outside them."
_EPILOG = "Exit codes: 0 done, 1 failure, 2 usage, 3-99 named failures (docs/exit-codes.md), 128+N ended by signal N."


def shared_options() -> Parser:
    """The options of every verb, as a parent of its parser; in whichever place they are given, the last one holds."""
    shared = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument(
        "--output",
        choices=("human", "json"),
        help="what stdout is for: text for people (default), or one JSON object per line",
    )
    shared.add_argument(
        "--log", metavar="FILE", help="write down everything that is told, as JSON lines (`pageferry report` draws it)"
    )
    shared.add_argument("--debug", action="store_true", help="log more, and show where errors come from")
    return shared


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        sys.stdout.write(f"pageferry {version('pageferry')}\n")
        parser.exit()


class _Completion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, shell: Any, option: str | None = None
    ) -> None:
        import shtab

        sys.stdout.write(shtab.complete(parser, shell) + "\n")
        parser.exit()
