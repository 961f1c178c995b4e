"""Membership of this host in a fleet: the command that keeps its agent running."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import msgspec

from pageferry.errors import FleetError, UsageError
from pageferry.fleet.cluster import AgentUnreachable, Cluster, listening_address
from pageferry.fleet.events import FleetJoined
from pageferry.fleet.inventory import HostConfig
from pageferry.fleet.options import JoinOptions, parse_labels
from pageferry.host.blocking import in_thread
from pageferry.host.registry import Registry, check_name
from pageferry.migration.transport.addresses import resolve
from pageferry.migration.transport.tls import Trust

WATCH = 2.0
"""Seconds between two requests to the own agent."""
LOST = 60.0
"""Seconds without a reply of the own agent after which the command fails; a service manager starts it again."""


def configuration(options: JoinOptions) -> HostConfig:
    """Return the configuration of this host's agent. Raises UsageError if it is invalid."""
    name = options.name or os.uname().nodename.partition(".")[0]
    check_name(name)
    address = options.listen or listening_address(options.address)
    trust = None
    if options.tls is not None:
        trust = Trust(options.tls, "receiver")
        Trust(options.tls, "source", hostname=name)
    resolve(f"{address}:0", insecure=options.insecure, what="address to listen on", trust=trust)
    registry = Registry()
    registry.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return HostConfig(
        name=name,
        address=address,
        run_directory=str(registry.path),
        tls=None if options.tls is None else str(options.tls.absolute()),
        insecure=options.insecure,
        images=tuple(os.path.abspath(one) for one in options.images),
        labels=parse_labels(options.labels),
        link=options.link,
        memory=options.memory,
        headroom=options.headroom,
        timeout=options.timeout,
    )


async def join_async(options: JoinOptions, listener: Callable[[FleetJoined], object]) -> None:
    """Run the agent of this host until the caller is cancelled. Workloads are not affected by its end.

    Raises UsageError, and FleetError if the cluster is lost; the command can then be started again.
    """
    config = configuration(options)
    cluster = await in_thread(Cluster.connect, options.address, insecure=options.insecure)
    try:
        await in_thread(cluster.start_agent, config.name, msgspec.json.encode(config))
        report = await cluster.report(config.name)
        if report.address != config.address:
            raise UsageError(f"cannot join as {config.name}: another host has this name; choose another with --name")
        listener(FleetJoined(host=config.name, address=config.address, notes=list(report.notes)))
        await _watch(cluster, config.name)
    finally:
        await asyncio.shield(in_thread(cluster.stop_agent, config.name))
        await asyncio.shield(in_thread(cluster.close))


async def _watch(cluster: Cluster, name: str) -> None:
    """Wait until the agent has not replied for `LOST` seconds. Ray starts it again if its process exits."""
    loop = asyncio.get_running_loop()
    heard = loop.time()
    while True:
        await asyncio.sleep(WATCH)
        try:
            await cluster.report(name)
            heard = loop.time()
        except AgentUnreachable as error:
            if loop.time() - heard > LOST:
                raise FleetError(
                    f"cannot keep the agent of {name} running: {error}; start the command again"
                ) from error
