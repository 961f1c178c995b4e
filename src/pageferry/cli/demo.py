"""`pageferry demo`: migrate the built-in workload between two processes of this host."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from subprocess import PIPE, Popen
from typing import Any

import msgspec

from pageferry.cli.arguments import fraction, integer, rate, seconds, size
from pageferry.cli.migrate import add_options, options_of
from pageferry.errors import WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.host.python import start_python
from pageferry.migration import api
from pageferry.migration.events import MigrationResult
from pageferry.report.migration import DemoView
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.workloads.ledger import LedgerOptions
from pageferry.workloads.ledger_process import Setup
from pageferry.workloads.open import open_workload

TIMEOUT = 30.0
"""Seconds to wait for the next event of a child process."""


class DemoResult(MigrationResult, frozen=True, kw_only=True, tag="demo"):
    """Result of the migration, and of the verification of the memory of the workload."""

    intact: bool
    """Whether no write is lost."""
    writes: int
    """Pages written before, during and after the migration."""
    checked: int
    """Pages compared with the records of the workload."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Start a workload that writes to memory continuously and records every write. Migrate it to another process "
        "while it writes, let it run there, and compare every page with the records. Takes a few seconds."
    )
    load = parser.add_argument_group("workload")
    load.add_argument("--size", type=size, default="512M", help="size of its memory (default: %(default)s)")
    load.add_argument("--rate", type=rate, default="20M", help="bytes written per second (default: %(default)s)")
    load.add_argument(
        "--working-set",
        type=fraction,
        default=0.3,
        metavar="FRACTION",
        help="fraction of the memory that is written to (default: %(default)s)",
    )
    load.add_argument(
        "--zeros",
        type=fraction,
        default=0.2,
        metavar="FRACTION",
        help="fraction of the writes that fill a page with zeros (default: %(default)s)",
    )
    load.add_argument("--threads", type=integer, default=2, metavar="N", help="writer threads (default: %(default)s)")
    load.add_argument(
        "--processes",
        type=integer,
        default=1,
        metavar="N",
        help="processes that the threads are distributed over (default: %(default)s)",
    )
    load.add_argument(
        "--seconds",
        type=seconds,
        default="1s",
        metavar="DURATION",
        help="time to write before and after the migration; a plain number is in seconds (default: %(default)s)",
    )
    add_options(parser)


async def run(args: argparse.Namespace) -> int:
    """Migrate the workload once and verify its memory."""
    with open_reporter(args.output, DemoView()) as out:
        result = await _demonstrate(args, out)
        out.final(result)
    return 0 if result.intact else 1


async def _demonstrate(args: argparse.Namespace, out: Reporter) -> DemoResult:
    name = f"demo-{os.getpid()}"
    setup = msgspec.json.encode(_setup(args, name)).decode()
    receive = ("receive", f"{name}-moved", "--workload", "demo", "--output", "json")
    async with (
        _process("pageferry.workloads.ledger_process", setup) as source,
        _process("pageferry", *receive) as destination,
    ):
        await _expect(source, "ready")
        address = (await _expect(destination, "listening"))["address"]
        await asyncio.sleep(args.seconds)
        workload = await open_workload(name)
        try:
            moved = await api.migrate(workload, address, listener=out.event, **options_of(args))
        finally:
            workload.close()
        await _expect(source, "ledger")
        await asyncio.sleep(args.seconds)
        destination.terminate()
        found = await _expect(destination, "ledger")
    fields = {field: getattr(moved, field) for field in MigrationResult.__struct_fields__}
    return DemoResult(**fields, intact=found["intact"], writes=found["writes"], checked=found["checked"])


def _setup(args: argparse.Namespace, name: str) -> Setup:
    options = LedgerOptions(
        threads=args.threads,
        rate=args.rate,
        working_set=args.working_set,
        zero_fraction=args.zeros,
        seed=os.getpid(),
    )
    return Setup(name=name, size=args.size, options=options, processes=args.processes)


@contextlib.asynccontextmanager
async def _process(module: str, *arguments: str) -> AsyncIterator[Popen[bytes]]:
    """Run a Python child process for the duration of the block."""
    process = _start(module, *arguments)
    try:
        yield process
    finally:
        process.terminate()
        await asyncio.shield(in_thread(process.communicate))


def _start(module: str, *arguments: str) -> Popen[bytes]:
    # Not asyncio.subprocess: before Python 3.12 its watcher thread waits for any state change of the child, and would
    # consume the stop that adoption waits for. In a separate session the child does not receive Ctrl-C.
    return start_python(module, *arguments, stdout=PIPE, stderr=PIPE, start_new_session=True)


async def _expect(process: Popen[bytes], kind: str) -> dict[str, Any]:
    """Return the next event of this type from a process. Raises WorkloadError, with its stderr, if it exits."""
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(TIMEOUT):
            while line := await in_thread(process.stdout.readline):
                event: dict[str, Any] = msgspec.json.decode(line)
                if event["type"] == kind:
                    return event
    except TimeoutError as slow:
        process.kill()  # ends the thread that reads its next line
        raise WorkloadError(f"no {kind!r} event from a process of the demo within {TIMEOUT:.0f} s") from slow
    raise WorkloadError(f"a process of the demo exited: {process.stderr.read().decode().strip()}")
