"""Tests of the lifecycle against a model: a workload has exactly one owner after any sequence of controller actions."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pageferry.errors import WorkloadError
from pageferry.memory.mappers import Sharing
from pageferry.memory.regions import Identity
from pageferry.workloads.access_page import AccessPage
from pageferry.workloads.handle import Handle
from pageferry.workloads.lifecycle import Lifecycle, Status
from pageferry.workloads.protocols import Faults

CONTROLLERS = [object(), object(), object()]
controllers = st.sampled_from(CONTROLLERS)


class Recorder:
    """Workload that only records whether it runs, and whether its memory was discarded."""

    name = "recorder"
    identity = Identity("arena", "recorder")
    regions = ()
    pager = None
    registered = False

    def __init__(self) -> None:
        self.runs = True
        self.discarded = False
        self.failing = False

    def pause(self) -> None:
        self.runs = False
        if self.failing:
            raise RuntimeError("the callback failed")

    def resume(self) -> None:
        assert not self.discarded
        self.runs = True

    sharing = Sharing()
    access = AccessPage()

    def attached_by(self, pid: int) -> Handle:
        raise NotImplementedError

    def observed_by(self, pid: int) -> None:
        pass

    def check_mappers(self, regions: object) -> None:
        pass

    def cancel(self) -> None:
        pass

    def save_state(self) -> bytes:
        assert not self.runs
        return b"state"

    def load_state(self, state: bytes) -> None:
        assert not self.runs

    def discard(self) -> None:
        assert not self.runs
        self.discarded = True

    @property
    def direct_io(self) -> bool:
        return False

    def faults(self) -> Faults:
        return Faults(0, 0)

    def report(self) -> dict[str, object]:
        return {}


class Lives(RuleBasedStateMachine):
    """Model of a workload: its status, and the controller that has paused or committed the workload."""

    def __init__(self) -> None:
        super().__init__()
        self.workload = Recorder()
        self.lifecycle = Lifecycle(self.workload)
        self.controller: object | None = None
        self.status = Status.RUNNING

    def allowed(self, controller: object, *statuses: Status) -> bool:
        return self.status in statuses and self.controller in (None, controller)

    @rule(controller=controllers, failing=st.booleans())
    def pause(self, controller: object, failing: bool) -> None:
        self.workload.failing = failing
        if not self.allowed(controller, Status.RUNNING, Status.PAUSED):
            with pytest.raises(WorkloadError):
                self.lifecycle.pause(controller)
        elif failing and self.status is Status.RUNNING:
            with pytest.raises(RuntimeError):
                self.lifecycle.pause(controller)
        else:
            self.lifecycle.pause(controller)
            self.status, self.controller = Status.PAUSED, controller

    @rule(controller=controllers)
    def resume(self, controller: object) -> None:
        if self.allowed(controller, Status.RUNNING, Status.PAUSED, Status.COMMITTED):
            self.lifecycle.resume(controller)
            self.status, self.controller = Status.RUNNING, None
        else:
            with pytest.raises(WorkloadError):
                self.lifecycle.resume(controller)

    @rule(controller=controllers)
    def save(self, controller: object) -> None:
        if self.allowed(controller, Status.PAUSED, Status.COMMITTED):
            assert self.lifecycle.save_state(controller) == b"state"
        else:
            with pytest.raises(WorkloadError):
                self.lifecycle.save_state(controller)

    @rule(controller=controllers)
    def commit(self, controller: object) -> None:
        if self.allowed(controller, Status.PAUSED, Status.COMMITTED):
            self.lifecycle.commit(controller)
            self.status, self.controller = Status.COMMITTED, controller
        else:
            with pytest.raises(WorkloadError):
                self.lifecycle.commit(controller)

    @rule(controller=controllers)
    def discard(self, controller: object) -> None:
        if self.allowed(controller, Status.PAUSED, Status.COMMITTED, Status.MOVED):
            self.lifecycle.discard(controller)
            self.status, self.controller = Status.MOVED, None
        else:
            with pytest.raises(WorkloadError):
                self.lifecycle.discard(controller)

    @precondition(lambda self: self.status is not Status.MOVED)
    @rule(controller=controllers)
    def lose(self, controller: object) -> None:
        self.lifecycle.lost(controller)
        if self.controller is controller:
            self.controller = None
            if self.status is Status.PAUSED:
                self.status = Status.RUNNING

    @invariant()
    def agrees(self) -> None:
        assert self.lifecycle.status is self.status
        assert self.workload.runs == (self.status is Status.RUNNING)
        assert self.workload.discarded == (self.status is Status.MOVED)


Lives.TestCase.settings = settings(max_examples=200, stateful_step_count=30)
TestLives = Lives.TestCase


def test_received_workload_waits_to_be_resumed() -> None:
    workload = Recorder()
    workload.runs = False
    lifecycle = Lifecycle(workload, received=True)
    assert lifecycle.status is Status.PAUSED
    lifecycle.load_state(CONTROLLERS[0], b"state")
    lifecycle.resume(CONTROLLERS[0])
    assert workload.runs
