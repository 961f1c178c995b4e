"""Tests of migrations that are interrupted, do not converge, or lose their output: the source keeps the workload."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pageferry.host.registry import Registry
from pageferry.workloads.lifecycle import Status
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import DEADLINE, Program

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def here() -> Iterator[Program]:
    with moving.ledger("here") as program:
        yield program


def untouched(here: Program) -> None:
    assert moving.status("here") is Status.RUNNING
    moving.runs("here")
    assert moving.traces(here.process.pid) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("point", ["greeted", "in-round", "between-rounds", "paused", "state-sent"])
def test_interrupted_migration_leaves_the_workload_running(
    here: Program, number: signal.Signals, code: int, point: str
) -> None:
    with (
        moving.receiver("there") as there,
        moving.migrating("here", moving.address_of(there), fault=f"source.{point}=stop") as migration,
    ):
        moving.stopped(migration)
        migration.process.send_signal(number)
        migration.process.send_signal(signal.SIGCONT)
        assert migration.wait() == code
        assert there.wait() == 21
    untouched(here)
    moving.ends_intact(here)


def test_interrupt_after_commit_does_not_stop_a_migration(here: Program) -> None:
    with (
        moving.receiver("there") as there,
        moving.migrating("here", moving.address_of(there), fault="source.committed=stop") as migration,
    ):
        moving.stopped(migration)
        migration.process.send_signal(signal.SIGINT)
        migration.process.send_signal(signal.SIGCONT)
        assert moving.until(migration, "migration")["status"] == "completed"
        assert migration.wait() == 0
        moving.ends_intact(here, "moved")
        moving.until(there, "received")
        moving.is_intact(there)


def test_second_interrupt_ends_a_migration_at_once(here: Program) -> None:
    """The destination hangs, so the first signal cannot take effect at once."""
    with (
        moving.receiver("there", fault="destination.state-received=stop") as there,
        moving.migrating("here", moving.address_of(there)) as migration,
    ):
        moving.stopped(there)
        migration.process.send_signal(signal.SIGINT)
        migration.process.send_signal(signal.SIGINT)
        assert migration.wait() == 130
        untouched(here)
        there.process.send_signal(signal.SIGCONT)
        assert there.wait() in (21, 23)
    moving.ends_intact(here)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("point", ["accepted", "in-round", "state-received", "promised"])
def test_interrupted_receiver_leaves_the_workload_running_at_source(
    here: Program, number: signal.Signals, point: str
) -> None:
    with moving.receiver("there", fault=f"destination.{point}=stop") as there:
        address = moving.address_of(there)
        # The source is stopped before it can commit.
        fault = "source.ready=stop" if point == "promised" else None
        with moving.migrating("here", address, fault=fault) as migration:
            moving.stopped(there)
            if fault:
                moving.stopped(migration)
            there.process.send_signal(number)
            there.process.send_signal(signal.SIGCONT)
            assert there.wait() == 128 + number
            migration.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 21
    untouched(here)
    assert list(Registry().entries()) == ["here"]


def test_receiver_interrupted_after_its_decision_runs_the_workload(here: Program) -> None:
    with (
        moving.receiver("there", fault="destination.decided=stop") as there,
        moving.migrating("here", moving.address_of(there)) as migration,
    ):
        moving.stopped(there)
        there.process.terminate()
        there.process.send_signal(signal.SIGCONT)
        assert moving.until(there, "ledger")["intact"]
        assert there.wait() == 0
        assert migration.wait() == 0
        moving.ends_intact(here, "moved")


def test_waiting_receiver_ends_on_interrupt() -> None:
    with moving.receiver("there") as there:
        moving.address_of(there)
        there.process.send_signal(signal.SIGINT)
        assert there.wait() == 130


def test_migration_that_does_not_converge_leaves_the_workload_running() -> None:
    options = {"threads": 2, "working_set": 1.0, "scatter": True}
    with moving.ledger("here", size=64 * MIB, options=options) as here:
        with moving.receiver("there") as there:
            command = [sys.executable, "-m", "pageferry", "migrate", "here", moving.address_of(there)]
            done = subprocess.run(
                [*command, "--max-downtime", "0.01", "--max-rounds", "4"],
                capture_output=True,
                text=True,
                timeout=DEADLINE,
            )
            assert done.returncode == 24
            message = done.stderr.splitlines()[-1]
            assert "cannot complete the migration of here: the workload modifies " in message
            assert "remain after 4 rounds" in message
            assert "allow --max-downtime " in message
            assert there.wait() == 21
        untouched(here)
        moving.ends_intact(here)


def test_closed_output_pipe_ends_the_migration(here: Program) -> None:
    with moving.receiver("there") as there:
        command = [sys.executable, "-m", "pageferry", "migrate", "here", moving.address_of(there), "--output", "json"]
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, "")
        assert there.wait() == 21
    untouched(here)
    moving.ends_intact(here)


def test_unreachable_or_invalid_address_is_reported_at_once(here: Program) -> None:
    command = [sys.executable, "-m", "pageferry", "migrate", "here"]
    for where, code, words in (
        ("127.0.0.1:1", 23, "start `pageferry receive` there"),
        ("192.0.2.1:7070", 2, "--insecure"),
        ("nowhere", 2, "expected HOST:PORT"),
        ("127.0.0.1:99999", 2, "expected HOST:PORT"),
    ):
        done = subprocess.run([*command, where], capture_output=True, text=True, timeout=DEADLINE)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    untouched(here)


def test_json_output_has_the_documented_keys(here: Program) -> None:
    """The result has all documented keys, and numbers have at most three decimals."""
    with moving.receiver("there") as there:
        command = [sys.executable, "-m", "pageferry", "migrate", "here", moving.address_of(there), "--output", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr) == (0, "")
        events = [json.loads(line) for line in done.stdout.splitlines()]
        moving.ends_intact(here, "moved")
    kinds = [event["type"] for event in events if event["type"] != "progress"]
    maps = "large-page-map"
    assert kinds == ["setup", maps, *["round"] * (len(kinds) - 4), maps, "migration"]
    assert [event["side"] for event in events if event["type"] == maps] == ["source", "destination"]
    result = events[-1]
    assert set(result) == {
        *("type status mode workload peer total-time setup-time downtime downtime-parts transferred memory").split(),
        *("normal duplicate skipped dirty-sync-count mbps large-pages populated faults-after-resume trace").split(),
        *"postcopy-requests postcopy cpu-throttle-percentage paused phases direct-io disks disks-transferred".split(),
        "clone",
    }
    assert set(result["downtime-parts"]) == set("total stop last-pages disks device-state populate resume".split())
    assert set(result["large-pages"]) == set("source destination fallbacks".split())
    assert set(result["populated"]) == set("mode large small failed work-ms".split())
    assert set(result["faults-after-resume"]) == set("minor major".split())
    assert set(result["trace"]) == set("granularity install-ms released-units".split())
    assert all(len(str(number).partition(".")[2]) <= 3 for event in events for number in _floats(event))


def _floats(value: object) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _floats(inner)
