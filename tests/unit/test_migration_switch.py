"""Telling a hybrid migration to switch over: heard by the one that is under way, an error where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pageferry.errors import UsageError
from pageferry.host import proc
from pageferry.host.registry import Folder, Registry
from pageferry.migration import switchover_request
from pageferry.migration.switchover_request import RECORD, Switch


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Registry(tmp_path).claim("web")


def test_a_request_is_heard_while_somebody_listens(folder: Folder) -> None:
    with switchover_request.listening(folder):
        assert not switchover_request.requested(folder)
        switchover_request.request(folder)
        assert switchover_request.requested(folder)
    assert not switchover_request.requested(folder)
    # One that was heard does not hold for the next migration.
    with switchover_request.listening(folder):
        assert not switchover_request.requested(folder)


def test_nobody_listens(folder: Folder) -> None:
    with pytest.raises(UsageError, match="hybrid"):
        switchover_request.request(folder)


def test_one_that_was_killed_does_not_listen(folder: Folder) -> None:
    started = proc.start_time(os.getpid())
    assert started is not None
    folder.store(RECORD, Switch(pid=os.getpid(), started=started + 1))
    with pytest.raises(UsageError, match="hybrid"):
        switchover_request.request(folder)
