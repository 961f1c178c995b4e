"""Tests of state machines, and of the order of the phases at the source of a migration."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from types import SimpleNamespace
from typing import cast

import pytest

from pageferry.host.state_machine import WrongState
from pageferry.migration.options import Options
from pageferry.migration.session import Job
from pageferry.migration.source import Source
from pageferry.migration.source_state import SourceState, source_states
from pageferry.migration.transport.addresses import resolve
from pageferry.workloads.protocols import Migratable

ORDER = (
    SourceState.NEW,
    SourceState.SETUP,
    SourceState.COPYING,
    SourceState.SWITCHING_OVER,
    SourceState.READY,
    SourceState.COMMITTED,
    SourceState.MOVED,
    SourceState.COMPLETED,
)
OTHERS = {
    (SourceState.SETUP, SourceState.FAILED),
    (SourceState.COPYING, SourceState.FAILED),
    (SourceState.SWITCHING_OVER, SourceState.FAILED),
    (SourceState.READY, SourceState.FAILED),
    (SourceState.COMMITTED, SourceState.REFUSED),
    (SourceState.REFUSED, SourceState.FAILED),
}
PERMITTED = {*pairwise(ORDER), *OTHERS}


def path_to(state: SourceState) -> tuple[SourceState, ...]:
    """Return the states to enter, in order, to reach `state` from NEW."""
    if state in ORDER:
        return ORDER[1 : ORDER.index(state) + 1]
    before = next(begin for begin, end in PERMITTED if end is state)
    return (*path_to(before), state)


@pytest.mark.parametrize("before", SourceState)
@pytest.mark.parametrize("after", SourceState)
def test_source_enters_its_phases_in_their_order_only(before: SourceState, after: SourceState) -> None:
    machine = source_states("web")
    for state in path_to(before):
        machine.enter(state)
    if (before, after) in PERMITTED:
        machine.enter(after)
        assert machine.state is after
    else:
        with pytest.raises(WrongState, match=f"migration of web is in state '{before}', and cannot change to"):
            machine.enter(after)
        assert machine.state is before


def test_source_runs_once() -> None:
    workload = cast(Migratable, SimpleNamespace(name="web"))
    source = Source(Job(workload=workload, options=Options()))
    source.state.enter(SourceState.SETUP)
    with pytest.raises(WrongState):
        asyncio.run(source.run(resolve("127.0.0.1:1", insecure=False, what="destination", trust=None)))


def test_committed_migration_does_not_fail_on_its_own() -> None:
    """After the commit, only an Abort of the destination returns the workload to the source."""
    assert (SourceState.COMMITTED, SourceState.FAILED) not in PERMITTED
    machine = source_states("web")
    for state in path_to(SourceState.COMMITTED):
        machine.enter(state)
    assert machine.is_in(SourceState.COMMITTED, SourceState.FAILED)
    with pytest.raises(WrongState):
        machine.enter(SourceState.FAILED)
