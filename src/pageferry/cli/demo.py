"""`pageferry demo`: the main job on the built-in workload, between two processes of this host."""

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
from pageferry.workloads.opening import open_workload

TIMEOUT = 30.0
"""Seconds for a process of ours to say the next thing."""


class DemoResult(MigrationResult, frozen=True, kw_only=True, tag="demo"):
    """A migration, and whether the workload has every write that it ever made."""

    intact: bool
    writes: int
    """Pages written before, during and after the migration."""
    checked: int
    """Pages that were compared with what the workload had written down about them."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = (
        "Starts a workload that writes to memory all the time, and keeps book of it; moves it to another process while "
        "it writes; lets it run on there; then compares every page with the books. Takes a few seconds."
    )
    load = parser.add_argument_group("workload")
    load.add_argument("--size", type=size, default=512 << 20, help="memory (512M)")
    load.add_argument("--rate", type=rate, default=20 << 20, help="bytes written per second (20M)")
    load.add_argument("--working-set", type=fraction, default=0.3, metavar="PART", help="part written to (%(default)s)")
    load.add_argument(
        "--zeros", type=fraction, default=0.2, metavar="PART", help="pages that become zeros (%(default)s)"
    )
    load.add_argument("--threads", type=integer, default=2, help="(%(default)s)")
    load.add_argument("--processes", type=integer, default=1, help="that share the threads (%(default)s)")
    load.add_argument(
        "--seconds",
        type=seconds,
        default=1.0,
        metavar="DURATION",
        help="to write before and after the move; a number alone counts seconds (1s)",
    )
    add_options(parser)


async def run(args: argparse.Namespace) -> int:
    """Move the workload once and check it."""
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
    """A Python process of ours, which ends with the block."""
    process = _start(module, *arguments)
    try:
        yield process
    finally:
        process.terminate()
        await asyncio.shield(in_thread(process.communicate))


def _start(module: str, *arguments: str) -> Popen[bytes]:
    # Not one of asyncio's: before Python 3.12 a thread of asyncio's waits for any change of such a child, and takes the
    # stop that adoption waits for. In a session of its own: Ctrl-C is for us, and we end it.
    return start_python(module, *arguments, stdout=PIPE, stderr=PIPE, start_new_session=True)


async def _expect(process: Popen[bytes], kind: str) -> dict[str, Any]:
    """The next line of that type from a process. Raises WorkloadError, with what it said, when it ends instead."""
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(TIMEOUT):
            while line := await in_thread(process.stdout.readline):
                said: dict[str, Any] = msgspec.json.decode(line)
                if said["type"] == kind:
                    return said
    except TimeoutError as slow:
        process.kill()  # whoever waits for its next line is released
        raise WorkloadError(f"a process of the demo has not said {kind!r} for {TIMEOUT:.0f} s") from slow
    raise WorkloadError(f"a process of the demo ended: {process.stderr.read().decode().strip()}")
