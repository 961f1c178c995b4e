"""Run directory that fills up during a migration: the decisions of the migration are still recorded."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.migration.ownership import Verdict, Verdicts

MIGRATION = "0" * 32


@pytest.fixture
def full(root: None, tmp_path: Path) -> Iterator[tuple[Verdicts, Path]]:
    """Yield the decisions on a small tmpfs, and its mount point. Skip the test if the tmpfs cannot be mounted."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=40,mode=700", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield Verdicts(tmp_path), tmp_path
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


@pytest.mark.parametrize("verdict", list(Verdict))
def test_decision_is_recorded_on_full_file_system(full: tuple[Verdicts, Path], verdict: Verdict) -> None:
    verdicts, folder = full
    verdicts.begin(MIGRATION)
    fill(folder)
    assert verdicts.decide(MIGRATION, verdict) is verdict
    for later in Verdict:
        assert verdicts.decide(MIGRATION, later) is verdict


def test_decision_is_withdrawn_on_full_file_system(full: tuple[Verdicts, Path]) -> None:
    verdicts, folder = full
    verdicts.begin(MIGRATION)
    verdicts.decide(MIGRATION, Verdict.COMMITTED)
    fill(folder)
    verdicts.withdraw(MIGRATION)
    assert verdicts.decide(MIGRATION, Verdict.COMMITTED) is Verdict.ABORTED


def test_arrival_is_recorded_on_full_file_system(full: tuple[Verdicts, Path]) -> None:
    verdicts, folder = full
    verdicts.begin(MIGRATION)
    verdicts.decide(MIGRATION, Verdict.COMMITTED)
    fill(folder)
    verdicts.arrive(MIGRATION)
    assert verdicts.arrived(MIGRATION)


def test_forgotten_migration_leaves_no_files(full: tuple[Verdicts, Path]) -> None:
    verdicts, folder = full
    verdicts.begin(MIGRATION)
    verdicts.decide(MIGRATION, Verdict.COMMITTED)
    verdicts.arrive(MIGRATION)
    verdicts.forget(MIGRATION)
    assert list((folder / ".verdicts").iterdir()) == []
