"""Tests of commands killed or disconnected at fault points of a post-copy migration: no page is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from pageferry.host.registry import Registry
from pageferry.workloads.lifecycle import Status
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import Program

pytestmark = pytest.mark.usefixtures("root")

BEFORE_COMMIT = "set-up in-round between-rounds paused missing-sent state-sent ready".split()
"""Fault points of the source in hybrid mode, before commit."""
RECEIVING = "accepted in-round pager-begun state-received loaded promised".split()
"""Fault points of the destination in hybrid mode, before it receives Commit."""
MODE = ("--mode", "hybrid", "--max-downtime", "0")
"""Options for at least two rounds, followed by post-copy of all remaining pages."""


@pytest.fixture
def here() -> Iterator[Program]:
    with moving.ledger("here", size=64 * MIB, options={"threads": 2, "rate": None}) as program:
        yield program


@pytest.fixture
def before(here: Program) -> list[str]:
    return moving.descriptors(here.process.pid)


def recovers(here: Program, there: Program) -> None:
    """Recover, and check that the workload is complete at the destination."""
    assert moving.status("here") is Status.COMMITTED
    assert moving.stands_still("here")
    with moving.migrating("here", "--recover") as recovery:
        said = {"type": "recovery", "workload": "here", "owner": "destination", "paused": None}
        assert moving.until(recovery, "recovery") == said
        assert recovery.wait() == 0
    moving.ends_intact(here, "moved")
    moving.runs("there")
    moving.is_intact(there)
    assert Registry().entries() == {}


@pytest.mark.parametrize(
    ("action", "point"),
    [("kill", point) for point in BEFORE_COMMIT] + [("drop", point) for point in ("missing-sent", "state-sent")],
)
def test_source_failure_before_commit_leaves_the_workload_running(
    here: Program, before: list[str], action: str, point: str
) -> None:
    with moving.receiver("there") as there:
        with moving.migrating("here", moving.address_of(there), *MODE, fault=f"source.{point}={action}") as migration:
            assert migration.wait() in (-signal.SIGKILL, 23)
        if point in ("state-sent", "ready"):
            there.process.terminate()  # the destination waits for a recovery
        assert there.wait() in (23, 143, -signal.SIGTERM)
    moving.runs_on(here, before)
    moving.ends_intact(here)


@pytest.mark.parametrize("point", RECEIVING)
def test_destination_killed_before_commit_leaves_the_workload_running(
    here: Program, before: list[str], point: str
) -> None:
    with moving.receiver("there", fault=f"destination.{point}=kill") as there:
        with moving.migrating("here", moving.address_of(there), *MODE) as migration:
            code = migration.wait()
            assert code in ((23, 26) if point == "promised" else (23,))
        assert there.wait() == -signal.SIGKILL
    if code == 26:
        with moving.migrating("here", "--take-back") as recovery:
            assert recovery.wait() == 0
    moving.runs_on(here, before)
    moving.ends_intact(here)


@pytest.mark.parametrize("action", ["kill", "drop"])
@pytest.mark.parametrize("point", ["commit-sent", "answered", "pushed", "arrived"])
def test_source_lost_in_postcopy_sends_remaining_pages_after_recovery(here: Program, action: str, point: str) -> None:
    """The source keeps all pages. Only the destination has recorded which pages are missing."""
    with moving.receiver("there") as there:
        with moving.migrating("here", moving.address_of(there), *MODE, fault=f"source.{point}={action}") as migration:
            code = migration.wait()
        moving.until(there, "received")
        if action == "kill":
            assert code == -signal.SIGKILL
        elif point == "arrived":
            # The source has been notified that all pages were received, so the lost connection is not a failure.
            assert code == 0
            moving.ends_intact(here, "moved")
            moving.is_intact(there)
            return
        else:
            assert code == (26 if point == "commit-sent" else 28)
        recovers(here, there)


@pytest.mark.parametrize("point", ["serves-again", "pushed"])
def test_killed_recovery_can_be_repeated(here: Program, point: str) -> None:
    with moving.receiver("there") as there:
        address = moving.address_of(there)
        with moving.migrating("here", address, *MODE, fault="source.answered=drop") as migration:
            assert migration.wait() == 28
        moving.until(there, "received")
        with moving.migrating("here", "--recover", fault=f"source.{point}=kill") as recovery:
            assert recovery.wait() == -signal.SIGKILL
        recovers(here, there)


@pytest.mark.parametrize("point", ["decided", "resumed", "all-here", "arrival-noted"])
def test_destination_disconnected_in_postcopy_is_reconnected(here: Program, point: str) -> None:
    with moving.receiver("there", fault=f"destination.{point}=drop") as there:
        with moving.migrating("here", moving.address_of(there), *MODE) as migration:
            assert migration.wait() in (26, 28)
        moving.until(there, "received")
        recovers(here, there)


# Receiver whose ledger reads all of its memory before it is resumed, as a hypervisor may do with a part of its memory.
READS_FIRST = """
import sys
from pageferry.cli.main import main
from pageferry.demo.ledger import LedgerWorkload
resume = LedgerWorkload._resume
def read_and_resume(workload):
    workload._view().digest()
    resume(workload)
LedgerWorkload._resume = read_and_resume
sys.exit(main())
"""


def test_reconnection_while_the_resume_waits_for_a_page(here: Program) -> None:
    """The source receives no message until the workload runs. It must be able to reconnect before that."""
    words = ("receive", "there", "--workload", "demo", "--output", "json", *moving.HERE.listening)
    with moving.HERE.program("-c", READS_FIRST, *words, fault="destination.decided=drop") as there:
        with moving.migrating("here", moving.address_of(there), *MODE) as migration:
            assert migration.wait() == 26
        recovers(here, there)


def test_ledger_of_a_killed_destination_can_be_taken_back(here: Program) -> None:
    """An arena ends with its process. The source keeps the contents that the arena had at the commit."""
    with moving.receiver("there", fault="destination.resumed=kill") as there:
        address = moving.address_of(there)
        with moving.migrating("here", address, *MODE) as migration:
            assert migration.wait() == 26
        assert there.wait() == -signal.SIGKILL
    with moving.receiver("other", "--listen", address) as other:
        moving.address_of(other)
        with moving.migrating("here", "--recover") as recovery:
            assert recovery.wait() == 28
        assert moving.status("here") is Status.COMMITTED
        assert moving.stands_still("here")
        other.process.terminate()
    with moving.migrating("here", "--take-back") as recovery:
        assert recovery.wait() == 0
    moving.runs("here")
    moving.ends_intact(here)
