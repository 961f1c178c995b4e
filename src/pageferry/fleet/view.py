"""View of a fleet, built from the reports of its hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping

from msgspec.structs import replace

from pageferry.fleet.cluster import AgentUnreachable, Cluster
from pageferry.fleet.model import Host, Link, Operation, View, Workload
from pageferry.fleet.protocol import HostReport, verb_of


async def reports(cluster: Cluster) -> dict[str, HostReport | AgentUnreachable]:
    """Return the report of each host that has joined, by name, or the reason why there is none."""
    names = await cluster.names()
    found = await asyncio.gather(*(_report(cluster, name) for name in names))
    return dict(zip(names, found, strict=True))


async def _report(cluster: Cluster, name: str) -> HostReport | AgentUnreachable:
    try:
        return await cluster.report(name)
    except AgentUnreachable as error:
        return error


def view_of(
    found: Mapping[str, HostReport | AgentUnreachable], *, draining: Iterable[str] = (), links: Mapping[str, int] = {}
) -> View:
    """Return the view of the planner.

    `draining`: hosts that accept no workloads; `links`: rates of shared links, bytes per second. Hosts that do not
    reply are in the view, so that a plan names them.
    """
    drained = set(draining)
    known = [one for one in found.values() if isinstance(one, HostReport)]
    silent = [
        Host(name=name, memory=0, reachable=False) for name, one in found.items() if not isinstance(one, HostReport)
    ]
    hosts = [host_of(one, draining=one.host.name in drained) for one in known]
    images = {image.identity: image for one in known for image in one.images}
    return View(
        hosts=(*hosts, *silent),
        workloads=tuple(_workloads(known)),
        images=tuple(images.values()),
        links=tuple(Link(name=name, rate=rate) for name, rate in links.items()),
        operations=tuple(operation for one in known for operation in operations_of(one)),
    )


def host_of(report: HostReport, *, draining: bool = False) -> Host:
    """Return the record of a host. `draining`: whether Ray drains its node."""
    return replace(report.host, draining=draining or report.host.draining)


def operations_of(report: HostReport) -> Iterator[Operation]:
    """Yield the operations of a host that are running, as the planner counts them: at the source of a move."""
    for one in report.operations:
        verb = verb_of(one.kind)
        if verb is not None and one.state == "running":
            yield Operation(
                verb=verb, workload=one.workload, host=report.host.name, destination=one.peer, fraction=one.fraction
            )


def _workloads(known: Iterable[HostReport]) -> Iterator[Workload]:
    """Yield each workload once: that of its owner. While a move ends, the source may still list the workload."""
    chosen: dict[str, Workload] = {}
    for one in (workload for report in known for workload in report.workloads):
        other = chosen.get(one.name)
        if other is None or (other.status == "unknown" and one.status != "unknown"):
            chosen[one.name] = one
    yield from chosen.values()
