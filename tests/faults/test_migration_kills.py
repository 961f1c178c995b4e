"""Tests of commands killed, stopped or disconnected at fault points of a migration.

The workload always has one owner, and loses no writes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.host.registry import Registry
from pageferry.workloads.lifecycle import Status
from tests.kernel import moving
from tests.kernel.programs import Program, wait_until

pytestmark = pytest.mark.usefixtures("root")

BEFORE_COMMIT = "connected greeted set-up in-round between-rounds paused last-pages-sent state-sent ready".split()
"""Fault points of the source before commit."""
WAITED_FOR = ("state-sent", "ready")
"""Fault points after which the destination is prepared, and waits for a recovery by the source."""
RECEIVING = "accepted in-round state-received loaded promised".split()
"""Fault points of the destination before it receives Commit."""


@pytest.fixture
def here() -> Iterator[Program]:
    with moving.ledger("here") as program:
        yield program


@pytest.fixture
def before(here: Program) -> list[str]:
    return moving.descriptors(here.process.pid)


def runs_on(here: Program, before: list[str]) -> None:
    """Check that the workload keeps running at the source, with the same open descriptors, and without mounts."""
    moving.runs_on(here, before)
    mounts = Path(f"/proc/{here.process.pid}/mountinfo").read_text().splitlines()
    assert not [mount for mount in mounts if str(Registry().path) in mount]


def moves(here: Program, name: str) -> None:
    """Check that the workload can be migrated."""
    with moving.receiver(name) as there:
        with moving.migrating("here", moving.address_of(there)) as migration:
            assert migration.wait() == 0
        assert there.json()["type"] == "received"
        moving.ends_intact(here, "moved")
        moving.is_intact(there)


@pytest.mark.parametrize(
    ("action", "point"),
    [("kill", point) for point in BEFORE_COMMIT] + [("drop", point) for point in BEFORE_COMMIT[::2]],
)
def test_source_failure_before_commit_leaves_the_workload_running(
    here: Program, before: list[str], action: str, point: str
) -> None:
    with moving.receiver("there") as there:
        fault = f"source.{point}={action}"
        with moving.migrating("here", moving.address_of(there), fault=fault) as migration:
            if action == "kill":
                assert migration.wait() == -signal.SIGKILL
            else:
                # At `ready`, the connection is dropped after the receipt of Ready. The source sends Commit next, and
                # receives no reply.
                assert migration.wait() == (26 if point == "ready" else 23)
        if (action, point) == ("drop", "ready"):
            assert moving.status("here") is Status.COMMITTED
            settle("here", owner="source")
        if point in WAITED_FOR or point == "connected":
            # The receiver waits for Hello or Recover, or is about to exit.
            there.process.terminate()
        assert there.wait() in (23, 143, -signal.SIGTERM)
    runs_on(here, before)
    assert "there" not in Registry().entries()
    moving.ends_intact(here)


def settle(name: str, *, owner: str) -> None:
    with moving.migrating(name, "--recover") as recovery:
        paused = False if owner == "source" else None
        said = {"type": "recovery", "workload": name, "owner": owner, "paused": paused}
        assert moving.until(recovery, "recovery") == said
        assert recovery.wait() == 0


@pytest.mark.parametrize("point", RECEIVING)
def test_destination_killed_before_commit_leaves_the_workload_running(
    here: Program, before: list[str], point: str
) -> None:
    with moving.receiver("there", fault=f"destination.{point}=kill") as there:
        with moving.migrating("here", moving.address_of(there)) as migration:
            # A destination killed at `promised` has sent Ready. The source may have sent Commit by then, and exits with
            # 26 in this case.
            code = migration.wait()
            assert code in ((23, 26) if point == "promised" else (23,))
        assert there.wait() == -signal.SIGKILL
    if code == 26:
        assert moving.status("here") is Status.COMMITTED
        assert moving.stands_still("here")
        with moving.migrating("here", "--take-back") as recovery:
            assert recovery.wait() == 0
    runs_on(here, before)
    moves(here, "there-again")


# -- after commit


@pytest.mark.parametrize("point", ["committed", "commit-sent"])
def test_workload_of_a_source_killed_after_commit_stays_paused_until_recovery(
    here: Program, before: list[str], point: str
) -> None:
    with moving.receiver("there") as there:
        with moving.migrating("here", moving.address_of(there), fault=f"source.{point}=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        assert moving.status("here") is Status.COMMITTED
        with moving.migrating("here", "127.0.0.1:1") as again:
            assert again.wait() == 10
        if point == "committed":
            # The destination has received no Commit, and has aborted.
            assert moving.stands_still("here")
            settle("here", owner="source")
            runs_on(here, before)
            assert there.wait() == 23
            moving.ends_intact(here)
        else:
            moving.until(there, "received")
            moving.runs("there")
            assert moving.stands_still("here")
            settle("here", owner="destination")
            moving.ends_intact(here, "moved")
            moving.is_intact(there)


def test_workload_of_a_source_killed_before_commit_keeps_running(here: Program, before: list[str]) -> None:
    with moving.receiver("there") as there:
        with moving.migrating("here", moving.address_of(there), fault="source.recorded=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        runs_on(here, before)
        settle("here", owner="source")
        assert there.wait() == 23
    runs_on(here, before)
    moves(here, "there-again")


@pytest.mark.parametrize("point", ["commit-received", "decided", "resumed"])
def test_recovery_after_a_connection_lost_after_commit(here: Program, before: list[str], point: str) -> None:
    with moving.receiver("there", fault=f"destination.{point}=drop") as there:
        with moving.migrating("here", moving.address_of(there)) as migration:
            assert migration.wait() == 26
        moving.until(there, "received")
        moving.runs("there")
        assert moving.stands_still("here")
        settle("here", owner="destination")
        moving.ends_intact(here, "moved")
        moving.is_intact(there)


def test_pending_recovery_is_resolved_by_another_receiver_of_the_host(here: Program, before: list[str]) -> None:
    with moving.receiver("there", fault="destination.commit-received=kill") as there:
        address = moving.address_of(there)
        with moving.migrating("here", address) as migration:
            assert migration.wait() == 26
        assert there.wait() == -signal.SIGKILL
    # No receiver listens at the address.
    with moving.migrating("here", "--recover") as recovery:
        assert recovery.wait() == 26
    assert moving.stands_still("here")
    # Another receiver finds no decision, and decides for the source.
    with moving.receiver("other", "--listen", address) as other:
        moving.address_of(other)
        settle("here", owner="source")
        runs_on(here, before)
        with moving.migrating("here", "--recover") as recovery:
            assert recovery.wait() == 2
        with moving.migrating("here", address) as migration:
            assert migration.wait() == 0
        assert other.json()["type"] == "received"


def test_receiver_with_another_run_directory_decides_nothing(here: Program, tmp_path: Path, before: list[str]) -> None:
    with moving.receiver("there", fault="destination.commit-received=kill") as there:
        address = moving.address_of(there)
        with moving.migrating("here", address) as migration:
            assert migration.wait() == 26
    elsewhere = {**moving.environment(None), "PAGEFERRY_RUN_DIR": str(tmp_path)}
    command = ("-m", "pageferry", "receive", "other", "--workload", "demo", "--output", "json", "--listen", address)
    with Program(*command, env=elsewhere) as other:
        moving.address_of(other)
        with moving.migrating("here", "--recover") as recovery:
            assert recovery.wait() == 26
    assert moving.status("here") is Status.COMMITTED
    with moving.migrating("here", "--take-back") as recovery:
        assert moving.until(recovery, "recovery")["owner"] == "source"
    runs_on(here, before)
    moving.ends_intact(here)


def test_source_resumes_if_the_destination_aborts_after_commit(here: Program, before: list[str]) -> None:
    """The destination is terminated between Ready and Commit, and decides to abort.

    It notifies the source, which has committed.
    """
    with (
        moving.receiver("there") as there,
        moving.migrating("here", moving.address_of(there), fault="source.committed=stop") as migration,
    ):
        moving.stopped(migration)
        there.process.terminate()
        assert there.wait() == 143
        migration.process.send_signal(signal.SIGCONT)
        assert migration.wait() == 21
    runs_on(here, before)
    moves(here, "there-again")


# -- peers that hang


@pytest.mark.parametrize("point", ["in-round", "paused", "state-sent"])
def test_destination_gives_up_a_source_that_hangs(here: Program, before: list[str], point: str) -> None:
    with moving.receiver("there", "--timeout", "1") as there:
        address = moving.address_of(there)
        with moving.migrating("here", address, "--timeout", "1", fault=f"source.{point}=stop") as migration:
            moving.stopped(migration)
            if point == "state-sent":  # the destination is prepared, and waits for a recovery
                with moving.migrating("here", "--recover") as recovery:
                    assert recovery.wait() == 10
                wait_until(lambda: "there" not in Registry().entries(), "the end of the claim")
                there.process.terminate()
            assert there.wait() in (23, 143, -signal.SIGTERM)
            migration.process.send_signal(signal.SIGCONT)
            assert migration.wait() in (21, 23)
    runs_on(here, before)
    moving.ends_intact(here)


@pytest.mark.parametrize("point", ["accepted", "in-round", "state-received"])
def test_source_gives_up_a_destination_that_hangs(here: Program, before: list[str], point: str) -> None:
    with moving.receiver("there", "--timeout", "1", fault=f"destination.{point}=stop") as there:
        with moving.migrating("here", moving.address_of(there), "--timeout", "1") as migration:
            moving.stopped(there)
            assert migration.wait() == 23
        runs_on(here, before)
        there.process.send_signal(signal.SIGCONT)
        assert there.wait() in (21, 23)
    moving.ends_intact(here)


@pytest.mark.parametrize("rival", [True, False])
def test_migration_fails_if_the_workload_dies(here: Program, rival: bool) -> None:
    """The source reports that the workload has exited, and the destination ends the migration."""
    with moving.receiver("there") as there:
        point = "paused" if rival else "between-rounds"
        with moving.migrating("here", moving.address_of(there), fault=f"source.{point}=stop") as migration:
            moving.stopped(migration)
            here.kill()
            migration.process.send_signal(signal.SIGCONT)
            assert migration.wait() == 13
        assert there.wait() == 21
    assert Registry().entries() == {}
