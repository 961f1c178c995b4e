"""Agent of a host: performs requests of drivers on the host, as an actor of Ray.

The agent keeps no state that matters. Migrations, receivers, checkpoints and clones are processes of `pageferry` that
outlive it (`operations`), and workloads are in the registry of the host. An agent that is started again continues where
the previous one was killed.

Memory is sent from host to host by the migration protocol, and never through Ray. With TLS, the receiver accepts only
the certificate of the source that the driver has named, and the source only that of the destination.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from pageferry.checkpoints.image_source import local_image_async
from pageferry.errors import FleetError, NoSuchWorkload, PageferryError, UsageError
from pageferry.fleet import records
from pageferry.fleet.inventory import HostConfig, Inventory, is_committed
from pageferry.fleet.model import Image
from pageferry.fleet.operations import Operations, Order, now
from pageferry.fleet.protocol import (
    CHECKPOINT,
    CLONE,
    MIGRATE,
    RECEIVE,
    RUN,
    Answer,
    AnyRequest,
    Cancel,
    Checkpoint,
    Clone,
    Describe,
    Done,
    HostReport,
    Identify,
    Kind,
    Migrate,
    Moved,
    OperationReport,
    Prepare,
    Query,
    Receive,
    Recover,
    RecoveryReport,
    Run,
    failed,
    succeeded,
)
from pageferry.host.blocking import in_thread
from pageferry.host.registry import Folder, QemuEntry, Registry
from pageferry.migration.ownership import CommitDecisions, committed
from pageferry.pager.records import POSTCOPY
from pageferry.workloads.qemu import placeholders

HOST = "host"
"""Placeholder in command lines for the name of the host."""
STARTING = 60.0
"""Maximum time until a receiver listens, seconds."""
_POLL = 0.05


class Agent:
    """Agent of one host. Ray calls its methods concurrently, on one event loop."""

    def __init__(self, config: bytes) -> None:
        """Start the agent. `config`: a `HostConfig` as JSON."""
        self._config = msgspec.json.decode(config, type=HostConfig)
        os.environ["PAGEFERRY_RUN_DIR"] = self._config.run_directory
        self._registry = Registry(Path(self._config.run_directory))
        self._operations = Operations(self._registry)
        self._inventory = Inventory(self._config, self._registry, self._operations)
        self._answering: set[asyncio.Task[None]] = set()

    async def call(self, request: bytes) -> bytes:
        """Perform a request (`pageferry.fleet.protocol`), and return the reply."""
        try:
            return succeeded(await self._perform(msgspec.json.decode(request, type=AnyRequest)))
        except msgspec.MsgspecError as wrong:
            return failed(FleetError(f"cannot perform the request: {wrong}; use the same version on all hosts"))
        except Exception as error:
            return failed(error)

    async def _perform(self, request: AnyRequest) -> msgspec.Struct:
        match request:
            case Describe():
                return await self.describe()
            case Prepare():
                return await in_thread(self._prepare, request.workload)
            case Receive():
                return await self._receive(request)
            case Query():
                return await self._query(request.id, request.wait)
            case Cancel():
                return await self._cancel(request.id)
            case Recover():
                return await self._recover(request.workload)
            case Answer():
                return await self._answer(request)
            case Identify():
                return await self._identify(request.image)
            case _:
                return await self._start(request)

    async def describe(self) -> HostReport:
        """Return the state of the host."""
        return await self._inventory.report()

    def _prepare(self, name: str) -> Moved:
        return records.prepare(self._registry, name, self._registry.lookup(name))

    # -- moves

    async def _receive(self, request: Receive) -> OperationReport:
        moved, config = request.moved, self._config
        words = ["receive", moved.name, "--listen", f"{config.address}:0", *self._trust()]
        if config.tls is not None:
            words += ["--allow", request.source]
        if moved.kind == "demo":
            words += ["--workload", "demo", "--output", "json"]
        else:
            words += [word for folder in config.images for word in ("--base", folder)]
            words += ["--detach", "--output", "json", "--", *self._filled(moved.command)]
        order = self._order(request.id, RECEIVE, moved.name, words, peer=request.source, moved=moved)
        await in_thread(self._operations.start, order)
        try:
            report = await self._listening(request.id)
            await in_thread(records.remember, self._registry, moved)
        except Exception:
            with contextlib.suppress(PageferryError):
                await self._cancel(request.id)
            raise
        return report

    async def _listening(self, identifier: str) -> OperationReport:
        """Wait until a receiver listens. Raises the error of a receiver that has ended."""
        async for report in self._reports(identifier, STARTING):
            if report.address is not None:
                return report
            if report.state != "running":
                raise FleetError(f"cannot receive {report.workload}: {report.message or 'its receiver was killed'}")
        raise FleetError(f"cannot receive {report.workload}: its receiver does not listen after {STARTING:g} s")

    async def _start(self, request: Migrate | Checkpoint | Clone | Run) -> OperationReport:
        """Start an operation that ends by itself."""
        match request:
            case Migrate():
                order = self._order(
                    request.id, MIGRATE, request.workload, self._migrate(request), peer=request.destination
                )
            case Checkpoint():
                words = ["checkpoint", request.workload, request.target, "--output", "json"]
                order = self._order(request.id, CHECKPOINT, request.workload, words)
            case Clone():
                order = await self._clone(request)
            case Run():
                moved = request.moved
                words = ["run", moved.name, "--detach", "--output", "json", "--", *self._filled(moved.command)]
                order = self._order(request.id, RUN, moved.name, words, moved=moved)
        await in_thread(self._operations.start, order)
        return await in_thread(self._operations.report, request.id)

    def _migrate(self, request: Migrate) -> list[str]:
        words = ["migrate", request.workload, request.address, "--mode", request.mode, *self._trust()]
        if self._config.tls is not None:
            words += ["--tls-hostname", request.destination]
        if request.bandwidth:
            words += ["--bandwidth", str(request.bandwidth)]
        if request.auto_converge:
            words.append("--auto-converge")
        if request.max_downtime is not None:
            words += ["--max-downtime", f"{request.max_downtime * 1e3:g}ms"]
        return [*words, "--output", "json"]

    async def _clone(self, request: Clone) -> Order:
        path = await in_thread(self._inventory.find_image, request.image)
        image = request.image if path is None else str(path)
        command = tuple(placeholders.fill(request.command, {placeholders.NUMBER: str(request.number)}))
        moved = Moved(name=request.workload, kind="qemu", command=command, labels=request.labels, group=request.group)
        words = ["restore", request.workload, image, "--memory", "shared", "--detach", "--output", "json"]
        words += ["--", *self._filled(command)]
        return self._order(request.id, CLONE, request.workload, words, moved=moved)

    # -- operations

    async def _query(self, identifier: str, wait: float) -> OperationReport:
        async for report in self._reports(identifier, wait):
            if report.state != "running":
                break
        return report

    async def _reports(self, identifier: str, seconds: float) -> AsyncIterator[OperationReport]:
        """Yield the states of an operation, at least once, for `seconds` seconds."""
        end = asyncio.get_running_loop().time() + seconds
        while True:
            yield await in_thread(self._operations.report, identifier)
            if asyncio.get_running_loop().time() >= end:
                return
            await asyncio.sleep(_POLL)

    async def _cancel(self, identifier: str) -> OperationReport:
        """End an operation, unless this could stall a workload (`_may_end`). Remove a QEMU that a killed receiver has
        left, and that has never run."""
        report = await in_thread(self._operations.report, identifier)
        if not await in_thread(self._may_end, report):
            return report
        await in_thread(self._operations.interrupt, identifier)
        report = await self._query(identifier, STARTING)
        if report.kind == RECEIVE and report.state != "running" and not report.received:
            await self._remove_waiting(report.workload)
        return report

    def _may_end(self, report: OperationReport) -> bool:
        """Return whether an operation may be cancelled: not a receiver whose workload runs, nor a migration after its
        commit. In post-copy, the workload needs both of them."""
        if report.kind == RECEIVE:
            return not report.received and not report.resumes
        return report.kind != MIGRATE or not is_committed(Folder(self._registry, report.workload))

    async def _remove_waiting(self, name: str) -> None:
        """Stop the QEMU of a workload that waits for its source. Do nothing if the workload has ever run here."""
        from pageferry.control.monitor import qmp_async
        from pageferry.control.stopping import stop_async

        with contextlib.suppress(NoSuchWorkload):
            if not isinstance(self._registry.lookup(name), QemuEntry):
                return
            status = await qmp_async(name, "query-status")
            if status["status"] == "inmigrate":
                await stop_async(name)

    # -- recovery

    async def _recover(self, name: str) -> RecoveryReport:
        """Resolve a migration whose outcome is unknown; if there is none, the workload belongs to this host."""
        from pageferry.migration.api import recover_async
        from pageferry.workloads.open import open_workload

        folder = self._registry.folder(name)
        with folder.exclusively("a recovery"):
            await in_thread(self._end_starts, name)
            if committed(folder) is None:
                return RecoveryReport(owner="source")
            workload = await open_workload(name, registry=self._registry)
            try:
                tls = self._config.tls
                owner = await recover_async(
                    workload, timeout=self._config.timeout, insecure=self._config.insecure, tls=tls
                )
            finally:
                workload.close()
        if owner == "unknown":
            raise FleetError(f"cannot recover {name}: the peer does not know the migration; see docs/faults.md")
        return RecoveryReport(owner=owner)

    def _end_starts(self, name: str) -> None:
        """Ensure that no migration of a workload is started later. Raises FleetError if one runs."""
        for one in self._operations.reports():
            if one.kind == MIGRATE and one.workload == name and one.state == "running":
                raise FleetError(f"cannot recover {name}: its migration still runs; retry when it has ended")
        self._operations.cancel_starts(MIGRATE, name)

    async def _answer(self, request: Answer) -> Done:
        """Reply to recovery requests at the address of a receiver that has exited, in the background. If pages are
        missing, receive them; otherwise, or if this fails, only report the recorded decision."""
        missing = Folder(self._registry, request.workload).path / POSTCOPY if request.workload else None
        if request.resume and missing is not None and missing.exists():
            with contextlib.suppress(FleetError):
                await self._resume(request)
                return Done()
        self._serve_outcomes(request)
        return Done()

    async def _resume(self, request: Answer) -> None:
        """Start a receiver for the missing pages of a workload. Raises FleetError if it does not listen."""
        identifier = f"{uuid.uuid4().hex[:12]}-in"
        words = ["receive", request.workload, "--resume", "--listen", request.address, *self._trust()]
        order = self._order(identifier, RECEIVE, request.workload, [*words, "--output", "json"])
        await in_thread(self._operations.start, order)
        await self._listening(identifier)

    def _serve_outcomes(self, request: Answer) -> None:
        from pageferry.migration.receiving import ListenOptions
        from pageferry.migration.recovery_server import RecoveryServer

        config = self._config
        options = ListenOptions(timeout=config.timeout, insecure=config.insecure, tls=config.tls)
        connections = options.open(request.address)
        server = RecoveryServer(connections, CommitDecisions(self._registry.path))

        async def serve() -> None:
            try:
                await asyncio.sleep(request.seconds)
            finally:
                server.close()
                await connections.close()

        server.begin("")
        task = asyncio.create_task(serve())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    # -- values

    async def _identify(self, image: str) -> Image:
        """Return the identity of an image. An image in a store is downloaded to the cache of this host."""
        async with local_image_async("image", image) as path:
            found = await in_thread(self._inventory.image, path)
        if found is None:
            raise UsageError(f"cannot clone {image}: it is not an image on {self._config.name}")
        return found

    def _trust(self) -> list[str]:
        words = ["--timeout", f"{self._config.timeout:g}s"]
        if self._config.tls is not None:
            return [*words, "--tls", self._config.tls]
        return [*words, "--insecure"]

    def _filled(self, command: Sequence[str]) -> list[str]:
        return placeholders.fill(command, {HOST: self._config.name})

    def _order(
        self,
        identifier: str,
        kind: Kind,
        workload: str,
        command: list[str],
        peer: str | None = None,
        moved: Moved | None = None,
    ) -> Order:
        return Order(
            id=identifier,
            kind=kind,
            workload=workload,
            peer=peer,
            command=command,
            started=now(),
            moved=moved,
        )
