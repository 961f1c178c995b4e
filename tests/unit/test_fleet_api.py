"""Tests of the functions of fleets with hosts that do not reply: none of them is taken as empty."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from msgspec.structs import replace

from pageferry import fleet
from pageferry.errors import FleetError, UsageError
from pageferry.fleet import api
from pageferry.fleet.cluster import AgentUnreachable
from pageferry.fleet.model import Host, Image, Workload
from pageferry.fleet.protocol import Cancel, Checkpoint, Describe, HostReport, OperationReport, Run
from pageferry.fleet.starting import complete
from tests.fleet_hosts import MOVED, ScriptedCluster, report

Use = Callable[..., ScriptedCluster]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Return a function that makes the functions use a cluster with the reports of hosts; those without one are
    silent."""

    def connect(**reports: HostReport | None) -> ScriptedCluster:
        def reply(host: str, request: Any) -> Any:
            found = reports[host]
            if found is None:
                raise AgentUnreachable(f"cannot reach the agent of {host}")
            match request:
                case Describe():
                    return found
                case Checkpoint():
                    return report(request.id, "checkpoint", "ended", exit_code=0)
                case Cancel():
                    (one,) = (one for one in found.operations if one.id == request.id)
                    return report(one.id, one.kind, "ended", exit_code=130)

        cluster = ScriptedCluster(reply, tuple(reports))

        @contextlib.asynccontextmanager
        async def connected(_: Any) -> AsyncIterator[ScriptedCluster]:
            yield cluster

        monkeypatch.setattr(api, "connected", connected)
        return cluster

    return connect


def host(
    name: str, *workloads: str, operations: tuple[OperationReport, ...] = (), status: Any = "running"
) -> HostReport:
    """Return the report of a host with the label rack=r7."""
    found = tuple(Workload(name=one, host=name, memory=1, private=1, status=status) for one in workloads)
    described = Host(name=name, memory=1 << 30, labels={"rack": "r7"})
    return HostReport(host=described, address="", workloads=found, operations=operations)


@pytest.mark.parametrize("hosts", [("b",), ("rack=r7",), ("a", "b")])
def test_evacuation_of_a_silent_host_is_not_complete(use: Use, hosts: tuple[str, ...]) -> None:
    use(a=host("a"), b=None, c=host("c"))
    found = fleet.evacuate(*hosts)
    assert not found.complete
    assert [one.name for one in found.silent] == ["b"]
    (failure,) = found.failures
    assert failure.startswith("workloads of b are not included: its agent does not reply; ")


def test_evacuation_is_complete_although_another_host_is_silent(use: Use) -> None:
    use(a=host("a"), b=None)
    assert fleet.evacuate("a").complete


def test_label_is_not_missing_if_a_host_is_silent(use: Use) -> None:
    use(a=host("a"), b=None)
    with pytest.raises(FleetError, match="no host that replies has this label, and b may have it"):
        fleet.evacuate("rack=r8")


def test_checkpoint_of_all_workloads_names_silent_hosts(use: Use) -> None:
    use(a=host("a", "web"), b=None)
    found = fleet.checkpoint("/images")
    assert ([one.workload for one in found.saved], [one.name for one in found.silent]) == (["web"], ["b"])
    assert not found.complete
    assert fleet.checkpoint("/images", "web").complete
    with pytest.raises(FleetError, match="cannot save db: no host that replies has this workload, and b may have it"):
        fleet.checkpoint("/images", "db")


def test_cancel_names_silent_hosts(use: Use) -> None:
    use(a=host("a", operations=(report("1", "checkpoint"),)), b=None)
    found = fleet.cancel()
    assert (found.workloads, [one.name for one in found.silent], found.complete) == (["web"], ["b"], False)


def test_cancel_leaves_the_receiver_of_a_move_to_its_source(use: Use) -> None:
    receiver = (report("1-in", "receive", peer="a"),)
    for source in (host("a", operations=(report("1-out", "migrate"),)), host("a", "web", status="unknown"), None):
        cluster = use(a=source, b=host("b", operations=receiver))
        fleet.cancel()
        assert cluster.to("b", Cancel) == []
    cluster = use(a=host("a"), b=host("b", operations=receiver))
    assert fleet.cancel().workloads == ["web"]
    assert cluster.to("b", Cancel) == [Cancel(id="1-in")]


def test_no_name_is_free_while_a_host_is_silent(use: Use) -> None:
    image = Image(identity="1:2", memory=1, name="/images/web.img")
    use(a=replace(host("a"), images=(image,)), b=None)
    with pytest.raises(
        FleetError, match=r"^cannot start web: b cannot be reached, and may have a workload of the same"
    ):
        fleet.run("web", ["qemu-system-x86_64"])
    with pytest.raises(FleetError, match=r"^cannot start clones: b cannot be reached, and may have a workload"):
        fleet.clone("web.img", ["qemu-system-x86_64"])


@pytest.mark.parametrize("started", [False, True])
def test_start_without_a_reply_is_followed_by_its_id(started: bool) -> None:
    def reply(_: str, request: Any) -> Any:
        if isinstance(request, Run):
            raise AgentUnreachable("no reply")
        if not started:
            raise UsageError("cannot find the operation")
        return report(request.id, "run", "ended", exit_code=0)

    work = complete(ScriptedCluster(reply), "a", Run(id="1", moved=MOVED))  # type: ignore[arg-type]
    if started:
        assert asyncio.run(work).exit_code == 0
    else:
        with pytest.raises(AgentUnreachable, match="no reply"):
            asyncio.run(work)
