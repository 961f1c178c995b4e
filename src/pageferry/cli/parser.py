"""Parser of the command line. It imports the modules of only those verbs that are among the arguments."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NoReturn

from pageferry import printable, values
from pageferry.cli.verbs import VERBS
from pageferry.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Parser of the command and of its verbs. Abbreviations of options are disabled: with them, a new option could make
    an existing abbreviation ambiguous."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _checker, "allow_abbrev": False, **options})
        self.described = True
        """Whether help texts are needed. `pageferry.cli.options` reads them from source code, which takes longer than
        parsing the arguments."""

    def format_help(self) -> str:
        """Return the help text, with colours if the output is a terminal."""
        from pageferry.cli.help import HelpFormatter

        self.formatter_class = HelpFormatter
        return super().format_help()

    def given(self, args: argparse.Namespace) -> dict[str, str]:
        """Return the arguments in `args` that differ from their defaults: their names in `args`, and in error messages.
        Options that every verb has are left out."""
        found = {}
        for action in self._actions:
            default = self.get_default(action.dest)
            if isinstance(default, str) and default != argparse.SUPPRESS:
                default = self._get_value(action, default)
            if default != argparse.SUPPRESS and getattr(args, action.dest) != default:
                found[action.dest] = action.option_strings[0] if action.option_strings else str(action.metavar)
        return {name: text for name, text in found.items() if name not in _METRICS}

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError for an invalid choice or verb. The message suggests a similar one."""
        if action.choices is not None and value not in action.choices:
            known = list(action.choices)
            meant = values.suggestion(str(value), known)
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}, expected one of {', '.join(known)}{meant}"
            )

    def error(self, message: str) -> NoReturn:
        """Print a usage error in one line, and exit. The usage text is not printed, because it would hide the error."""
        text = f"{self.prog}: error: {message} (see `{self.prog} --help`)"
        self.exit(UsageError.exit_code, f"{printable.message(text)}\n")


def _checker(prog: str) -> argparse.HelpFormatter:
    """Return the formatter with which argparse checks each new argument. Its width is fixed, because a query of the
    terminal's width imports a dozen modules."""
    return argparse.HelpFormatter(prog, width=78)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line `words`, and return the arguments.

    Raises SystemExit after printing the help, the version, a completion or a usage error.
    """
    # The shared options have their defaults in the namespace: defaults in the parser of a verb would override options
    # that are given before the verb.
    defaults = argparse.Namespace(output="human", log=None, debug=False, command=[])
    parser = build_parser(words)
    head, command = _split(words)
    args, unknown = parser.parse_known_args(head, defaults)
    _check_separator(args, words)
    if hasattr(args, "words") and not any(word.startswith("-") for word in unknown):
        # argparse fills an argument of any number of words (`words`) only from the words before the next option.
        args.words, unknown = [*args.words, *unknown], []
    if unknown:
        args.usage_error(f"unrecognized arguments: {' '.join(unknown)}{_meant(args, unknown)}")
    if command and not args.takes_command:
        args.usage_error("this verb does not take a command after --; remove it")
    args.command = command
    return args


def _check_separator(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Report a usage error if the words contain a command line of QEMU but no `--` before it."""
    program = next((word for word in words if PurePath(word).name.startswith("qemu-system")), None)
    if args.takes_command and program is not None and "--" not in words:
        args.usage_error(f"missing -- before {program}: the command line of QEMU follows --")


def _meant(args: argparse.Namespace, unknown: Sequence[str]) -> str:
    """Return the text that suggests similar options of the verb for unknown options; empty if there are none."""
    known = args.usage_error.__self__._option_string_actions
    return "".join(values.suggestion(word.split("=")[0], known) for word in unknown if word.startswith("--"))


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words at the first `--`, into the arguments of pageferry and the command line of another program."""
    if "--" not in words:
        return list(words), []
    end = words.index("--")
    return list(words[:end]), list(words[end + 1 :])


def build_parser(words: Sequence[str]) -> Parser:
    """Return the parser for the command line `words`.

    The parser lists all verbs. It imports the modules of only those verbs that are among `words`, and defines the
    arguments of these verbs only. If a workload has the name of a verb, one unnecessary module is imported. For a
    completion, all modules are imported.
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
    described = completing or not {"-h", "--help"}.isdisjoint(words)
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        below = verbs.add_parser(name, help=verb.help, description=verb.help, parents=[shared])
        if completing or name in words:
            below.described = described
            module = importlib.import_module(verb.module)
            module.configure(below)
            below.set_defaults(
                run=lambda args, work=verb.work or verb.module: importlib.import_module(work).run(args),
                takes_command=getattr(module, "TAKES_COMMAND", False),
                works_on=getattr(module, "WORKS_ON", None),
                usage_error=below.error,
            )
            if hasattr(module, "WORKS_ON"):
                _add_metrics(below)
    return parser


_METRICS = frozenset({"metrics", "metrics_insecure"})
"""Names of the arguments that `_add_metrics` adds."""


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="serve Prometheus metrics at this address while the command runs",
    )
    group.add_argument(
        "--metrics-insecure", action="store_true", help="allow unencrypted --metrics on addresses other than loopback"
    )


_DESCRIPTION = "Migrate, save and optimise the memory of running workloads from outside."
_EPILOG = (
    "Exit codes: 0 success, 1 failure, 2 usage error, 3-99 named errors (docs/exit-codes.md), 128+N ended by signal N."
)


def shared_options() -> Parser:
    """Return a parent parser with the options that every verb has. They may precede or follow the verb; if an option is
    repeated, the last value is used."""
    shared = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument(
        "--output",
        choices=("human", "json"),
        help="format of stdout: human-readable text, or one JSON object per line (default: human)",
    )
    shared.add_argument("--log", metavar="FILE", help="write all events to FILE as JSON lines (see `pageferry report`)")
    shared.add_argument("--debug", action="store_true", help="log debug messages, and print tracebacks of errors")
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
