"""The verbs of the command line.

A verb has two functions::

    def configure(parser: argparse.ArgumentParser) -> None     sets the description and adds the arguments
    def run(args: argparse.Namespace) -> int                   runs the verb, returns the exit code; may be `async def`

`configure` is in a separate module of `pageferry.cli.syntax`, so that `--help` and the check of arguments do not import
the module with `run`.

A verb that starts another program sets `TAKES_COMMAND = True`; `args.command` contains the words after `--`. A
long-running verb sets `WORKS_ON` to the name of the argument that contains its workload or workloads. `pageferry top`
then shows the verb, and the verb accepts `--metrics`. Every verb has `args.output` (`human` or `json`), `args.log` and
`args.debug`. Events that a verb emits through `pageferry.report.reporter` are written to the log. The first SIGINT or
SIGTERM cancels an asynchronous `run`, and raises KeyboardInterrupt in a synchronous one. The command prints errors of
`pageferry.errors` that `run` raises, and exits with their exit code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verb:
    """Row of the table of verbs. `--help` of the command uses it without importing the module of the verb."""

    module: str
    """Full name of the module that contains `configure`."""
    help: str
    """Summary, one sentence."""
    work: str | None = None
    """Full name of the module that contains `run`; it is imported when the verb runs. None: the same module."""


def _verb(name: str, text: str) -> Verb:
    return Verb(f"pageferry.cli.syntax.{name}", text, f"pageferry.cli.{name}")


VERBS: dict[str, Verb] = {
    "check": _verb("check", "Check kernel features and permissions, and suggest remedies."),
    "demo": _verb("demo", "Migrate a self-checking workload between two local processes."),
    "receive": _verb("receive", "Wait for a migrating workload and run it on this host."),
    "migrate": _verb("migrate", "Migrate a running workload to a receiver."),
    "checkpoint": _verb("checkpoint", "Save a running workload to an image file."),
    "restore": _verb("restore", "Start a QEMU guest from an image, loading its memory on demand."),
    "clone": _verb("clone", "Start several QEMU guests from one image, with shared memory."),
    "serve": _verb("serve", "Load the memory of Firecracker microVMs from an image on demand."),
    "fleet": _verb("fleet", "Place, move, clone and save workloads over the hosts of a Ray cluster."),
    "image": _verb("image", "Inspect, verify, compare, flatten, convert, copy or delete images."),
    "cache": _verb("cache", "List or remove images that restores from stores have downloaded."),
    "disks": _verb("disks", "Write overlays back to the disks that a checkpoint has frozen."),
    "run": _verb("run", "Start a QEMU guest under management."),
    "adopt": _verb("adopt", "Register a QEMU guest that is already running."),
    "large-pages": _verb("large_pages", "Estimate how much of each huge page is used, and reclaim cold memory."),
    "sharing": _verb("sharing", "Find duplicate pages, and merge them where it pays off."),
    "report": _verb("report", "Summarise event logs as text, JSON or one HTML page."),
    "list": _verb("list", "List the workloads of this host."),
    "top": _verb("top", "Show workloads and running operations, refreshed periodically."),
    "console": _verb("console", "Connect the terminal to the serial console of a QEMU guest."),
    "monitor": _verb("monitor", "Execute commands of the monitor of a QEMU guest."),
    "logs": _verb("logs", "Print the log of a QEMU guest."),
    "peek": _verb("peek", "Print memory of a workload."),
    "pause": _verb("pause", "Pause QEMU guests."),
    "resume": Verb("pageferry.cli.syntax.resume", "Resume paused QEMU guests.", "pageferry.cli.pause"),
    "shutdown": _verb("shutdown", "Shut down a QEMU guest, and wait until it has ended."),
    "stop": _verb("stop", "Stop a workload."),
}
"""Verbs by their name on the command line, in the order of `--help`."""
