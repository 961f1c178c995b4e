"""The verbs of the command line.

A verb is a module of two functions::

    def configure(parser: argparse.ArgumentParser) -> None     its description and arguments
    def run(args: argparse.Namespace) -> int                   the work; returns the exit code; may be `async def`

Every verb has `args.output` (`human` or `json`) and `args.debug` already. An asynchronous `run` is cancelled by the
first SIGINT or SIGTERM; in a synchronous one they raise KeyboardInterrupt. Errors of `pageferry.errors` that leave
`run` are printed and end in their exit code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verb:
    """A row of the table: what `--help` needs to know without importing the module."""

    module: str
    """Full name of the module."""
    help: str
    """One line."""


VERBS: dict[str, Verb] = {}
"""Name on the command line -> verb, in the order of the help."""
