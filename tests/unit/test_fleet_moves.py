"""Tests of one move of a fleet: what the driver concludes from the replies of the hosts, and what agents cancel."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pageferry
from pageferry.errors import FleetError, UsageError, WorkloadError
from pageferry.fleet import operation_process, steps
from pageferry.fleet.cluster import AgentUnreachable
from pageferry.fleet.inventory import arriving_workloads
from pageferry.fleet.model import Move
from pageferry.fleet.mover import Attempt
from pageferry.fleet.operations import KEPT, Operations, Order, now
from pageferry.fleet.protocol import (
    Answer,
    Cancel,
    Done,
    Migrate,
    OperationReport,
    Prepare,
    Query,
    Receive,
    Recover,
    RecoveryReport,
)
from pageferry.host.registry import Registry
from tests.fleet_hosts import MOVED, ScriptedCluster, agent, asked, operation, report
from tests.kernel.programs import wait_until

MOVE = Move(workload="web", source="a", destination="b", mode="hybrid", bytes=1, seconds=1.0, downtime=0.1)


class Hosts:
    """Replies of the two hosts of a move. `end`: report of the migration, or the error of the request for it."""

    def __init__(self, end: Any, **errors: Exception) -> None:
        self.end = end
        self.errors = errors

    def __call__(self, host: str, request: Any) -> Any:
        if (error := self.errors.get(type(request).__name__.lower())) is not None:
            raise error
        match request:
            case Prepare():
                return MOVED
            case Receive():
                return report(request.id, "receive", address="10.0.0.2:1")
            case Cancel():
                return report(request.id, "receive", "ended", exit_code=130)
            case Migrate():
                return report(request.id, "migrate")
            case Query():
                if isinstance(self.end, Exception):
                    raise self.end
                return self.end


def moved(hosts: Hosts) -> tuple[steps.Ended, ScriptedCluster]:
    """Return how an attempt has ended, and the cluster."""
    cluster = ScriptedCluster(hosts)
    return asyncio.run(Attempt(cluster, MOVE, 1, lambda _: None).run()), cluster  # type: ignore[arg-type]


def ended(code: int) -> OperationReport:
    return report("op", "migrate", "ended", exit_code=code, message="the reason")


@pytest.mark.parametrize("code", [130, 143, 25, 1, 10, 20, 26, 28, -9, None])
def test_exit_code_that_proves_no_end_before_the_commit_leaves_the_owner_unknown(code: int) -> None:
    found, cluster = moved(Hosts(ended(code)))
    assert (found.outcome, found.reason) == ("unknown", "the reason")
    assert (found.cause == "cancelled") == (code in (130, 143, 25))
    assert cluster.to("b", Cancel) == []


@pytest.mark.parametrize(
    ("code", "cause"), [(3, "unsupported"), (21, "refused"), (23, "connection-lost"), (27, "other"), (31, "other")]
)
def test_exit_code_that_proves_an_end_before_the_commit_ends_the_receiver(code: int, cause: str) -> None:
    found, cluster = moved(Hosts(ended(code)))
    assert (found.outcome, found.cause) == ("aborted", cause)
    assert len(cluster.to("b", Cancel)) == 1


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("PAGEFERRY_RUN_DIR", str(folder))
    return folder


@pytest.fixture
def web(run: Path) -> Iterator[Path]:
    """Register an arena as the workload `web`. Return its directory."""
    arena = pageferry.Arena("1MiB", on_pause=threading.Lock())
    arena.register("web")
    try:
        yield run / "web"
    finally:
        arena.close()


@pytest.mark.parametrize("committed", [False, True])
def test_migration_is_not_interrupted_after_its_commit(run: Path, committed: bool) -> None:
    if committed:
        (run / "web").mkdir()
        (run / "web" / "migration.json").write_text(json.dumps({"version": 2, "migration": "0" * 32, "peer": "b:1"}))
    with operation(run, "migrate") as process:
        found = asyncio.run(asked(agent(run), Cancel(id="op"), OperationReport))
        assert (process.poll() is None) == committed
    assert found.state == ("running" if committed else "lost")


def test_receiver_without_a_reply_is_ended() -> None:
    found, cluster = moved(Hosts(None, receive=AgentUnreachable("no reply")))
    assert (found.outcome, found.reason) == ("aborted", "no reply")
    (request,) = cluster.to("b", Receive)
    assert cluster.to("b", Cancel) == [Cancel(id=request.id)]


def test_receiver_whose_workload_cannot_be_recorded_is_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise WorkloadError("no space left")

    monkeypatch.setattr("pageferry.fleet.records.remember", fail)
    receiver = agent(run)
    with pytest.raises(WorkloadError, match="no space left"):
        asyncio.run(asked(receiver, Receive(id="op", moved=MOVED, source="a"), OperationReport))
    assert asyncio.run(asked(receiver, Query(id="op"), OperationReport)).state == "ended"


@pytest.mark.parametrize("error", [UsageError("no record"), FleetError("cannot read the record")])
def test_migration_without_a_report_has_an_unknown_end(error: Exception) -> None:
    found, cluster = moved(Hosts(error))
    assert (found.outcome, found.reason) == ("unknown", str(error))
    assert cluster.to("b", Cancel) == []


def test_migration_whose_start_has_failed_on_the_way_is_followed() -> None:
    found, _ = moved(Hosts(ended(0), migrate=FleetError("cannot use the reply")))
    assert found.outcome == "done"


def test_receiver_is_not_interrupted_while_it_owns_the_workload(run: Path) -> None:
    with operation(run, "receive", {"type": "received"}) as process:
        found = asyncio.run(asked(agent(run), Cancel(id="op"), OperationReport))
        assert process.poll() is None
    assert found.state == "running"


def test_record_that_cannot_be_read_is_no_end_of_an_operation(run: Path) -> None:
    with operation(run, "migrate"):
        (run / ".fleet" / "op" / "order.json").unlink()
        (run / ".fleet" / "op" / "order.json").mkdir()
        with pytest.raises(FleetError, match="not a regular file"):
            asyncio.run(asked(agent(run), Query(id="op"), OperationReport))


@pytest.mark.parametrize("missing", [False, True])
def test_agent_reports_the_decision_although_no_pages_can_be_received(run: Path, web: Path, missing: bool) -> None:
    async def answer() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        host = agent(run)
        await asked(host, Answer(address=address, seconds=30.0, workload="web", resume=True), Done)
        _, writer = await asyncio.open_connection(*address.split(":"))
        writer.close()

    if missing:
        (web / "postcopy.json").write_text("{}")
    asyncio.run(answer())
    assert len(list(run.glob(".fleet/*"))) == missing


def test_receiver_of_missing_pages_does_not_hide_its_workload_and_is_not_interrupted(run: Path) -> None:
    first, resumed = report("1", "receive", "lost", peer="a"), report("2", "receive")
    assert arriving_workloads([first, resumed]) == set()
    assert arriving_workloads([report("1", "receive", peer="a")]) == {"web"}
    with operation(run, "receive", peer=None) as process:
        asyncio.run(asked(agent(run), Cancel(id="op"), OperationReport))
        assert process.poll() is None


def test_migration_is_not_started_after_a_recovery(run: Path, web: Path) -> None:
    assert web.is_dir()
    with operation(run, "migrate") as process:
        folder = run / ".fleet" / "op"
        with pytest.raises(FleetError, match="its migration still runs"):
            asyncio.run(asked(agent(run), Recover(workload="web"), RecoveryReport))
        assert not (folder / "cancelled").exists()
        for name in ("running.json", "process.json"):  # as if the agent was killed when it started the supervisor
            (folder / name).unlink()
        os.utime(folder, (0, 0))
        assert asyncio.run(asked(agent(run), Recover(workload="web"), RecoveryReport)).owner == "source"
        process.kill()
    started = run / "started"
    words = [sys.executable, operation_process.__file__, str(folder), json.dumps([["touch", str(started)]])]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    wait_until(lambda: (folder / "ended.json").exists(), "the end of the operation")
    assert json.loads((folder / "ended.json").read_text()) == {"exit-code": 25}
    assert not started.exists()


def test_records_of_lost_operations_are_removed(run: Path) -> None:
    operations = Operations(Registry(run))
    for number in range(KEPT + 2):
        folder = run / ".fleet" / f"lost-{number}"
        folder.mkdir(mode=0o700, parents=True)
        os.utime(folder, (number, number))
    (run / ".fleet").chmod(0o700)
    operations.start(Order(id="next", kind="run", workload="web", command=["list"], started=now()))
    assert len(list(operations.path.iterdir())) == KEPT + 1
    wait_until(lambda: operations.report("next").state == "ended", "the end of the operation")
