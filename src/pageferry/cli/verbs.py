"""The verbs of the command line.

A verb is a module of two functions::

    def configure(parser: argparse.ArgumentParser) -> None     its description and arguments
    def run(args: argparse.Namespace) -> int                   the work; returns the exit code; may be `async def`

A verb that starts another program says `TAKES_COMMAND = True` and finds what stands after `--` in `args.command`.
One that may work for long says in `WORKS_ON` which argument names its workload, or workloads: it can be
seen at work in `pageferry top`, and takes `--metrics`.
Every verb has `args.output` (`human` or `json`), `args.log` and `args.debug` already; what it tells through
`pageferry.report.reporter` is written to the log. An asynchronous `run` is cancelled by the
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


VERBS: dict[str, Verb] = {
    "check": Verb("pageferry.cli.check", "Say what this kernel and this user allow, and what to do about the rest."),
    "demo": Verb("pageferry.cli.demo", "Move the built-in workload between two processes, and check every write."),
    "receive": Verb("pageferry.cli.receive", "Wait for a workload and run it here."),
    "migrate": Verb("pageferry.cli.migrate", "Move a running workload to a receiver."),
    "checkpoint": Verb("pageferry.cli.checkpoint", "Save a running workload to an image, while it runs."),
    "restore": Verb("pageferry.cli.restore", "Let a QEMU guest go on where an image was taken, at once."),
    "image": Verb("pageferry.cli.image", "Say what is in an image, verify, compare or flatten it."),
    "run": Verb("pageferry.cli.run", "Start a QEMU guest under management."),
    "adopt": Verb("pageferry.cli.adopt", "Manage a QEMU guest that somebody else has started."),
    "large-pages": Verb("pageferry.cli.large_pages", "Say which large pages are hardly used; reclaim from those."),
    "sharing": Verb("pageferry.cli.sharing", "Say how much memory equal pages take, and share them where it pays."),
    "report": Verb("pageferry.cli.report", "Draw what runs did, from their logs."),
    "list": Verb("pageferry.cli.list", "List the workloads of this host."),
    "top": Verb("pageferry.cli.top", "Show the workloads of this host and what is done with them, again and again."),
    "peek": Verb("pageferry.cli.peek", "Look at the memory of a workload."),
    "stop": Verb("pageferry.cli.stop", "End a workload."),
}
"""Name on the command line -> verb, in the order of the help."""
