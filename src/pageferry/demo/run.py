"""Migration of the built-in workload between two processes of this host."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from subprocess import PIPE, Popen
from typing import Any

import msgspec

from pageferry.demo.events import DemoResult
from pageferry.demo.ledger import LedgerOptions
from pageferry.demo.options import DemoOptions
from pageferry.demo.process import Setup
from pageferry.errors import WorkloadError
from pageferry.events import Listener
from pageferry.host.blocking import in_thread
from pageferry.host.python import start_python
from pageferry.migration import api
from pageferry.migration.events import MigrationResult
from pageferry.workloads.open import open_workload

TIMEOUT = 30.0
"""Seconds to wait for the next event of a child process."""


async def demonstrate(demo: DemoOptions, listener: Listener, options: dict[str, Any]) -> DemoResult:
    """Start the workload, migrate it once, and verify its memory.

    `options` are options of `migrate`. Raises the same errors as `migrate`, and WorkloadError if a process of the demo
    fails.
    """
    setup = _setup(demo)
    receive = ("receive", f"{setup.name}-moved", "--workload", "demo", "--output", "json")
    async with (
        _process("pageferry.demo.process", msgspec.json.encode(setup).decode()) as source,
        _process("pageferry", *receive) as destination,
    ):
        await _expect(source, "ready")
        address = (await _expect(destination, "listening"))["address"]
        await asyncio.sleep(demo.seconds)
        workload = await open_workload(setup.name)
        try:
            moved = await api.migrate_async(workload, address, listener=listener, **options)
        finally:
            workload.close()
        await _expect(source, "ledger")
        await asyncio.sleep(demo.seconds)
        destination.terminate()
        found = await _expect(destination, "ledger")
    fields = {field: getattr(moved, field) for field in MigrationResult.__struct_fields__}
    return DemoResult(**fields, intact=found["intact"], writes=found["writes"], checked=found["checked"])


def _setup(demo: DemoOptions) -> Setup:
    """Return the setup of the process that runs the workload. The name of the workload contains our process ID, so that
    it is unique."""
    options = LedgerOptions(
        threads=demo.threads,
        rate=demo.rate,
        working_set=demo.working_set,
        zero_fraction=demo.zeros,
        seed=os.getpid(),
    )
    return Setup(name=f"demo-{os.getpid()}", size=demo.size, options=options, processes=demo.processes)


@contextlib.asynccontextmanager
async def _process(module: str, *arguments: str) -> AsyncIterator[Popen[bytes]]:
    """Run a Python module in a child process, which is terminated at the end of the block."""
    process = _start(module, *arguments)
    try:
        yield process
    finally:
        process.terminate()
        await asyncio.shield(in_thread(process.communicate))


def _start(module: str, *arguments: str) -> Popen[bytes]:
    # Not asyncio.subprocess: before Python 3.12, its watcher thread calls waitpid(2) on the child, and would consume
    # the ptrace-stop that adoption waits for. The child gets a separate session, so that it does not receive Ctrl-C.
    return start_python(module, *arguments, stdout=PIPE, stderr=PIPE, start_new_session=True)


async def _expect(process: Popen[bytes], kind: str) -> dict[str, Any]:
    """Return the next event of type `kind` from a process. Raises WorkloadError if the process exits (the message
    contains its stderr), or if no such event is received within TIMEOUT."""
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(TIMEOUT):
            while line := await in_thread(process.stdout.readline):
                event: dict[str, Any] = msgspec.json.decode(line)
                if event["type"] == kind:
                    return event
    except TimeoutError as slow:
        process.kill()  # ends the thread that waits for the next line of output
        raise WorkloadError(f"cannot run the demo: no {kind!r} event within {TIMEOUT:.0f} s") from slow
    raise WorkloadError(f"cannot run the demo: a process exited: {process.stderr.read().decode().strip()}")
