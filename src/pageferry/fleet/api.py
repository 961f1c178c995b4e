"""Python API of fleets: `pageferry.fleet`, which the commands use too."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Unpack

from pageferry import values
from pageferry.errors import FleetError
from pageferry.events import Listener, ignore
from pageferry.fleet import planning
from pageferry.fleet.cluster import AgentUnreachable, Cluster
from pageferry.fleet.driver import Driver
from pageferry.fleet.events import FleetResult, FleetStatus, SilentHost
from pageferry.fleet.model import Plan, View
from pageferry.fleet.options import (
    ClusterArguments,
    ClusterOptions,
    MoveArguments,
    MoveOptions,
)
from pageferry.fleet.protocol import HostReport
from pageferry.fleet.view import reports, view_of
from pageferry.host.blocking import in_thread, synchronous


@contextlib.asynccontextmanager
async def connected(options: ClusterOptions) -> AsyncIterator[Cluster]:
    """Connect to the cluster for the time of the block. Raises FleetError, UnsupportedError, UsageError."""
    cluster = await in_thread(Cluster.connect, options.address, insecure=options.insecure)
    try:
        yield cluster
    finally:
        await asyncio.shield(in_thread(cluster.close))


async def status_async(**options: Unpack[ClusterArguments]) -> FleetStatus:
    """Return the hosts, workloads, images and running operations of a fleet, as its hosts report them.

    `options`: address (HOST:PORT of Ray's head), insecure. Raises FleetError.
    """
    chosen = values.options(ClusterOptions, options)
    async with connected(chosen) as cluster:
        found = await reports(cluster)
        view = view_of(found, draining=await cluster.draining())
    known = {name: one for name, one in found.items() if isinstance(one, HostReport)}
    return FleetStatus(
        hosts=[host for host in view.hosts if host.name in known],
        workloads=list(view.workloads),
        images=list(view.images),
        operations=list(view.operations),
        silent=[
            SilentHost(name=name, reason=str(one)) for name, one in found.items() if isinstance(one, AgentUnreachable)
        ],
        notes={name: list(one.notes) for name, one in known.items() if one.notes},
    )


status = synchronous(status_async)


async def move_async(
    workload: str, host: str, *, listener: Listener = ignore, **options: Unpack[MoveArguments]
) -> FleetResult:
    """Move a workload of the fleet to a host.

    `listener` receives the `Plan` first, and then the progress of its moves. `options`: address, insecure, dry_run
    (only plan). Raises UsageError, FleetError, and FleetIncomplete if the workload is not on that host afterwards.
    """
    chosen = values.options(MoveOptions, options)
    name, destination = values.text("workload", workload), values.text("host", host)
    async with connected(chosen) as cluster:
        view = await current(cluster)
        plan = planning.move(view, name, destination)
        return await carry_out(cluster, "move", view, plan, chosen, listener)


move = synchronous(move_async)


async def current(cluster: Cluster) -> View:
    """Return the view of the fleet. Raises FleetError if no host has joined."""
    found = await reports(cluster)
    if not found:
        raise FleetError("cannot plan: no host has joined the fleet; run `pageferry fleet join` on its hosts")
    return view_of(found, draining=await cluster.draining())


async def carry_out(
    cluster: Cluster, verb: str, view: View, plan: Plan, options: MoveOptions, listener: Listener
) -> FleetResult:
    """Report a plan, and carry out its moves unless it is only planned."""
    listener(plan)
    begun = time.monotonic()
    if options.dry_run or not plan.moves:
        return FleetResult(verb=verb, total_time=0.0, unplaced=list(plan.unplaced))
    moves, given_up = await Driver(cluster, view, plan, listener).run()
    known: Sequence[str] = [one.workload for one in given_up]
    unplaced = [*given_up, *(one for one in plan.unplaced if one.workload not in known)]
    return FleetResult(verb=verb, total_time=time.monotonic() - begun, moves=moves, unplaced=unplaced)
