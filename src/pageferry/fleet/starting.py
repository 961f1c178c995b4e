"""Starts of clones and guests, and checkpoints, on several hosts at the same time."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from pageferry.errors import FleetError, PageferryError, UsageError
from pageferry.fleet.cluster import CALL, AgentUnreachable, Cluster
from pageferry.fleet.protocol import Checkpoint, Clone, OperationReport, Query, Run

_WAIT = 1.0
"""Seconds that an agent waits for the end of an operation in one request."""

AGENT_TIMEOUT = 60.0
"""Seconds for which to wait for an agent that does not reply while one of its operations runs."""


class OnHost(Protocol):
    """Task for one host."""

    @property
    def host(self) -> str:
        """Name of the host."""


T = TypeVar("T", bound=OnHost)
R = TypeVar("R")


def new_id() -> str:
    """Return the identifier of a new operation."""
    return uuid.uuid4().hex[:12]


async def on_hosts(tasks: Sequence[T], perform: Callable[[T], Awaitable[R]], per_host: int) -> list[R]:
    """Perform tasks, at most `per_host` at the same time on one host, and return their results in the same order."""
    slots: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(per_host))

    async def one(task: T) -> R:
        async with slots[task.host]:
            return await perform(task)

    return await asyncio.gather(*map(one, tasks))


async def complete(cluster: Cluster, host: str, request: Checkpoint | Clone | Run) -> OperationReport:
    """Start an operation on a host, and wait for its end. Raises FleetError if it fails, AgentUnreachable.

    A request without a reply may have started the operation: its state is then requested as that of any other.
    """
    loop = asyncio.get_running_loop()
    report, lost = None, None
    try:
        report = await cluster.call(host, request, OperationReport)
    except AgentUnreachable as error:
        lost = error
    heard = loop.time()
    while report is None or report.state == "running":
        try:
            query = Query(id=request.id, wait=_WAIT)
            report = await cluster.call(host, query, OperationReport, timeout=_WAIT + CALL)
            heard = loop.time()
        except AgentUnreachable:
            if loop.time() - heard > AGENT_TIMEOUT:
                raise
            await asyncio.sleep(_WAIT)
        except UsageError:
            if lost is None:
                raise
            raise lost from None  # it was not started
    if report.exit_code != 0:
        raise FleetError(f"{host}: {report.message or 'the process of the operation was killed'}")
    return report


async def reason_of(work: Awaitable[OperationReport]) -> tuple[OperationReport | None, str]:
    """Return the report of an operation, or the reason why it has failed."""
    try:
        return await work, ""
    except PageferryError as error:
        return None, str(error)
