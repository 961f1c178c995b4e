"""Tests of requests to switch over: a running hybrid migration accepts them; without such a migration, they fail."""

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


def test_request_is_received_by_the_running_migration(folder: Folder) -> None:
    with switchover_request.listening(folder):
        assert not switchover_request.requested(folder)
        switchover_request.request(folder)
        assert switchover_request.requested(folder)
    assert not switchover_request.requested(folder)
    # An accepted request does not apply to the next migration.
    with switchover_request.listening(folder):
        assert not switchover_request.requested(folder)


def test_request_without_a_migration_is_an_error(folder: Folder) -> None:
    with pytest.raises(UsageError, match="hybrid"):
        switchover_request.request(folder)


def test_request_to_a_killed_migration_is_an_error(folder: Folder) -> None:
    started = proc.start_time(os.getpid())
    assert started is not None
    folder.store(RECORD, Switch(pid=os.getpid(), started=started + 1))
    with pytest.raises(UsageError, match="hybrid"):
        switchover_request.request(folder)
