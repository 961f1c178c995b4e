"""Run directory that fills up during a migration: the decisions of the migration are still recorded."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.migration.ownership import CommitDecision, CommitDecisions

MIGRATION = "0" * 32


@pytest.fixture
def full(root: None, tmp_path: Path) -> Iterator[tuple[CommitDecisions, Path]]:
    """Yield the decisions on a small tmpfs, and its mount point. Skip the test if the tmpfs cannot be mounted."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=40,mode=700", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield CommitDecisions(tmp_path), tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def fill(folder: Path) -> None:
    """Use all bytes, then all inodes, of a file system."""
    with contextlib.suppress(OSError), open(folder / "bytes", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (folder / f"file-{number}").touch()
    free = os.statvfs(folder)
    assert (free.f_bavail, free.f_favail) == (0, 0)


@pytest.mark.parametrize("decision", list(CommitDecision))
def test_decision_is_recorded_on_full_file_system(full: tuple[CommitDecisions, Path], decision: CommitDecision) -> None:
    decisions, folder = full
    decisions.begin(MIGRATION)
    fill(folder)
    assert decisions.decide(MIGRATION, decision) is decision
    for later in CommitDecision:
        assert decisions.decide(MIGRATION, later) is decision


def test_decision_is_withdrawn_on_full_file_system(full: tuple[CommitDecisions, Path]) -> None:
    decisions, folder = full
    decisions.begin(MIGRATION)
    decisions.decide(MIGRATION, CommitDecision.COMMITTED)
    fill(folder)
    decisions.withdraw(MIGRATION)
    assert decisions.decide(MIGRATION, CommitDecision.COMMITTED) is CommitDecision.ABORTED


def test_arrival_is_recorded_on_full_file_system(full: tuple[CommitDecisions, Path]) -> None:
    decisions, folder = full
    decisions.begin(MIGRATION)
    decisions.decide(MIGRATION, CommitDecision.COMMITTED)
    fill(folder)
    decisions.arrive(MIGRATION)
    assert decisions.arrived(MIGRATION)


def test_forgotten_migration_leaves_no_files(full: tuple[CommitDecisions, Path]) -> None:
    decisions, folder = full
    decisions.begin(MIGRATION)
    decisions.decide(MIGRATION, CommitDecision.COMMITTED)
    decisions.arrive(MIGRATION)
    decisions.forget(MIGRATION)
    assert list((folder / ".verdicts").iterdir()) == []
