"""Tests of the operations of a host's agent: processes that outlive it, and their records."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from pageferry.errors import UsageError
from pageferry.fleet.operations import Operations, Order, now
from pageferry.fleet.protocol import Moved, OperationReport
from pageferry.host.registry import Registry
from tests.kernel.programs import wait_until

LISTING = ["list", "--output", "json"]
WAITING = ["receive", "demo", "--workload", "demo", "--output", "json", "--insecure", "--listen", "127.0.0.1:0"]


@pytest.fixture
def operations() -> Operations:
    return Operations(Registry())


def order(identifier: str, command: list[str]) -> Order:
    return Order(id=identifier, kind="receive", workload="demo", command=command, started=now())


def until(operations: Operations, identifier: str, state: str) -> OperationReport:
    wait_until(lambda: operations.report(identifier).state == state, f"{identifier}: {state}")
    return operations.report(identifier)


def test_end_of_an_operation_is_recorded(operations: Operations) -> None:
    operations.start(order("succeeds", LISTING))
    assert until(operations, "succeeds", "ended").exit_code == 0
    operations.start(order("fails", ["peek", "nothing", "0", "1"]))
    report = until(operations, "fails", "ended")
    assert report.exit_code == 11
    assert report.message.startswith("no workload named nothing")


def test_repeated_start_has_no_effect(operations: Operations) -> None:
    operations.start(order("once", LISTING))
    first = until(operations, "once", "ended")
    operations.start(order("once", ["check"]))
    assert operations.report("once") == first


def test_receiver_reports_its_address_until_it_is_interrupted(operations: Operations) -> None:
    operations.start(order("waits", WAITING))
    wait_until(lambda: operations.report("waits").address is not None, "the address")
    report = operations.report("waits")
    assert (report.state, report.received) == ("running", False)
    again = Operations(Registry())  # an agent that was started again
    assert again.report("waits") == report
    again.interrupt("waits")
    assert until(again, "waits", "ended").exit_code == 130


def test_operation_is_lost_if_its_processes_are_killed(operations: Operations) -> None:
    operations.start(order("lost", WAITING))
    wait_until(lambda: operations.report("lost").address is not None, "the address")
    folder = operations.path / "lost"
    child = json.loads((folder / "running.json").read_text())["pid"]
    os.kill(json.loads((folder / "process.json").read_text())["pid"], signal.SIGKILL)
    assert operations.report("lost").state == "running"
    os.kill(child, signal.SIGKILL)
    assert until(operations, "lost", "lost").exit_code is None


def test_operation_is_an_ordinary_process_without_the_token(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        operations.start(order("plain", WAITING))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    wait_until(lambda: operations.report("plain").address is not None, "the address")
    pid = json.loads((operations.path / "plain" / "running.json").read_text())["pid"]
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert b"RAY_" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert int(status["SigBlk"], 16) == 0
    assert os.getsid(pid) != os.getsid(0)
    operations.interrupt("plain")
    until(operations, "plain", "ended")


def test_unknown_operation_is_refused(operations: Operations) -> None:
    with pytest.raises(UsageError, match="this host has no record of it"):
        operations.report("nothing")


def test_record_of_a_workload_does_not_apply_to_a_later_one_of_its_name(operations: Operations) -> None:
    moved = Moved(name="web", kind="qemu", command=("qemu",))
    started = Order(id="run", kind="run", workload="web", command=LISTING, started=now(), moved=moved)
    operations.start(started)
    until(operations, "run", "ended")
    folder = operations.registry.path / "web"
    folder.mkdir()
    (folder / "workload.json").write_text("{}")
    os.utime(folder / "workload.json", (now() + 60, now() + 60))
    assert list(operations.workloads()) == []
    os.utime(folder / "workload.json", (started.started, started.started + 1e-6))
    assert [one.name for one in operations.workloads()] == ["web"]
    (folder / "workload.json").unlink()
    folder.rmdir()
