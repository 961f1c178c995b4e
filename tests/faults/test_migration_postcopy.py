"""Agents killed and cut off at named points of a post-copy: one owner, and pages that are kept until they are over."""

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
"""Points of the source in hybrid mode."""
RECEIVING = "accepted in-round pager-begun state-received loaded promised".split()
MODE = ("--mode", "hybrid", "--max-downtime", "0")
"""Two rounds at least, then post-copy: everything that there is."""


@pytest.fixture
def here() -> Iterator[Program]:
    with moving.ledger("here", size=64 * MIB, options={"threads": 2, "rate": None}) as program:
        yield program


@pytest.fixture
def before(here: Program) -> list[str]:
    return moving.descriptors(here.process.pid)


def recovers(here: Program, there: Program) -> None:
    """The source sends the rest, and everything is at the destination then."""
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
def test_a_source_that_fails_before_commit_leaves_it_running(
    here: Program, before: list[str], action: str, point: str
) -> None:
    with moving.receiver("there") as there:
        with moving.migrating("here", moving.address_of(there), *MODE, fault=f"source.{point}={action}") as migration:
            assert migration.wait() in (-signal.SIGKILL, 23)
        if point in ("state-sent", "ready"):
            there.process.terminate()  # it waits for a source that may be in doubt
        assert there.wait() in (23, 143, -signal.SIGTERM)
    moving.runs_on(here, before)
    moving.ends_intact(here)


@pytest.mark.parametrize("point", RECEIVING)
def test_a_destination_killed_before_commit_leaves_it_running(here: Program, before: list[str], point: str) -> None:
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
def test_a_source_that_is_lost_after_commit_goes_on_later(here: Program, action: str, point: str) -> None:
    """It keeps its pages, and knows which are missing from the destination alone."""
    with moving.receiver("there") as there:
        with moving.migrating("here", moving.address_of(there), *MODE, fault=f"source.{point}={action}") as migration:
            code = migration.wait()
        moving.until(there, "received")
        if action == "kill":
            assert code == -signal.SIGKILL
        elif point == "arrived":
            # It has been told that everything is there: the link is no loss any more.
            assert code == 0
            moving.ends_intact(here, "moved")
            moving.is_intact(there)
            return
        else:
            assert code == (26 if point == "commit-sent" else 28)
        recovers(here, there)


@pytest.mark.parametrize("point", ["serves-again", "pushed"])
def test_a_recovery_that_is_lost_is_repeated(here: Program, point: str) -> None:
    with moving.receiver("there") as there:
        address = moving.address_of(there)
        with moving.migrating("here", address, *MODE, fault="source.answered=drop") as migration:
            assert migration.wait() == 28
        moving.until(there, "received")
        with moving.migrating("here", "--recover", fault=f"source.{point}=kill") as recovery:
            assert recovery.wait() == -signal.SIGKILL
        recovers(here, there)


@pytest.mark.parametrize("point", ["decided", "resumed", "all-here", "arrival-noted"])
def test_a_destination_that_is_cut_off_after_commit_is_linked_again(here: Program, point: str) -> None:
    with moving.receiver("there", fault=f"destination.{point}=drop") as there:
        with moving.migrating("here", moving.address_of(there), *MODE) as migration:
            assert migration.wait() in (26, 28)
        moving.until(there, "received")
        recovers(here, there)


# A ledger that reads all of its memory before it goes on, as a hypervisor may read some.
READS_FIRST = """
import sys
from pageferry.cli.main import main
from pageferry.workloads.ledger import LedgerWorkload
resume = LedgerWorkload._resume
def read_and_resume(workload):
    workload._view().digest()
    resume(workload)
LedgerWorkload._resume = read_and_resume
sys.exit(main())
"""


def test_a_workload_that_needs_a_page_to_be_resumed_is_linked_again(here: Program) -> None:
    """Until it has been resumed the source hears nothing: it must be let in before."""
    words = ("receive", "there", "--workload", "demo", "--output", "json", *moving.HERE.listening)
    with moving.HERE.program("-c", READS_FIRST, *words, fault="destination.decided=drop") as there:
        with moving.migrating("here", moving.address_of(there), *MODE) as migration:
            assert migration.wait() == 26
        recovers(here, there)


def test_a_destination_that_is_killed_takes_the_ledger_along(here: Program) -> None:
    """An arena lives and dies with its process. What is here stays as it was when it was given away."""
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
