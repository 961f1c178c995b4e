"""The verbs of the command line.

A verb is a module of two functions::

    def configure(parser: argparse.ArgumentParser) -> None     sets the description and adds the arguments
    def run(args: argparse.Namespace) -> int                   runs the verb, returns the exit code; may be `async def`

A verb that starts another program sets `TAKES_COMMAND = True`; `args.command` has the words after `--`. A long-running
verb sets `WORKS_ON` to the name of the argument that has its workload or workloads: `pageferry top` shows it, and it
takes `--metrics`. Every verb has `args.output` (`human` or `json`), `args.log` and `args.debug`; events that it emits
through `pageferry.report.reporter` are written to the log. The first SIGINT or SIGTERM cancels an asynchronous `run`,
and raises KeyboardInterrupt in a synchronous one. The command prints errors of `pageferry.errors` that `run` raises,
and exits with their exit code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verb:
    """Row of the table: what `--help` needs without importing the module."""

    module: str
    """Full name of the module."""
    help: str
    """Summary, one sentence."""


VERBS: dict[str, Verb] = {
    "check": Verb("pageferry.cli.check", "Check kernel features and permissions, and suggest remedies."),
    "demo": Verb("pageferry.cli.demo", "Migrate a self-checking workload between two local processes."),
    "receive": Verb("pageferry.cli.receive", "Wait for a migrating workload and run it on this host."),
    "migrate": Verb("pageferry.cli.migrate", "Migrate a running workload to a receiver."),
    "checkpoint": Verb("pageferry.cli.checkpoint", "Save a running workload to an image file."),
    "restore": Verb("pageferry.cli.restore", "Start a QEMU guest from an image, loading its memory on demand."),
    "image": Verb("pageferry.cli.image", "Inspect, verify, compare or flatten images."),
    "run": Verb("pageferry.cli.run", "Start a QEMU guest under management."),
    "adopt": Verb("pageferry.cli.adopt", "Register a QEMU guest that is already running."),
    "large-pages": Verb(
        "pageferry.cli.large_pages", "Estimate how much of each huge page is used, and reclaim cold memory."
    ),
    "sharing": Verb("pageferry.cli.sharing", "Find duplicate pages, and merge them where it pays off."),
    "report": Verb("pageferry.cli.report", "Summarise event logs as text, JSON or one HTML page."),
    "list": Verb("pageferry.cli.list", "List the workloads of this host."),
    "top": Verb("pageferry.cli.top", "Show workloads and running operations, refreshed periodically."),
    "peek": Verb("pageferry.cli.peek", "Print memory of a workload."),
    "stop": Verb("pageferry.cli.stop", "Stop a workload."),
}
"""Verbs by their name on the command line, in the order of `--help`."""
