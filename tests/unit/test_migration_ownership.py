"""Tests of a destination's decisions: the first is final for all processes, and stays while a source may request it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pageferry.errors import WorkloadError
from pageferry.migration.ownership import KEPT, CommitDecision, CommitDecisions

MIGRATION = "0123456789abcdef" * 2


def test_first_decision_is_final(tmp_path: Path) -> None:
    decisions = CommitDecisions(tmp_path)
    decisions.begin(MIGRATION)
    assert decisions.decide(MIGRATION, CommitDecision.COMMITTED) is CommitDecision.COMMITTED
    assert decisions.decide(MIGRATION, CommitDecision.ABORTED) is CommitDecision.COMMITTED
    # A process that starts later reads the same decision.
    assert CommitDecisions(tmp_path).decide(MIGRATION, CommitDecision.ABORTED) is CommitDecision.COMMITTED


def test_only_begun_migrations_are_known(tmp_path: Path) -> None:
    decisions = CommitDecisions(tmp_path / "not" / "there")
    assert not decisions.knows(MIGRATION)
    decisions.begin(MIGRATION)
    assert decisions.knows(MIGRATION)
    assert not decisions.knows("f" * 32)


def test_concurrent_processes_get_the_same_decision(tmp_path: Path) -> None:
    """Separate processes decide, as two receivers on a host may do."""
    rounds = [f"{number:032x}" for number in range(20)]
    for migration in rounds:
        CommitDecisions(tmp_path).begin(migration)
    children = []
    for wanted in (CommitDecision.COMMITTED, CommitDecision.ABORTED) * 2:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            heard = "".join(CommitDecisions(tmp_path).decide(migration, wanted).value[0] for migration in rounds)
            os.write(writer, heard.encode())
            os._exit(0)
        os.close(writer)
        children.append((child, reader))
    answers = set()
    for child, reader in children:
        with open(reader, "rb") as pipe:
            answers.add(pipe.read())
        assert os.waitpid(child, 0)[1] == 0
    assert len(answers) == 1
    assert len(answers.pop()) == len(rounds)


def test_concurrent_threads_get_the_same_decision(tmp_path: Path) -> None:
    decisions = CommitDecisions(tmp_path)
    decisions.begin(MIGRATION)
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(lambda v: decisions.decide(MIGRATION, v), list(CommitDecision) * 8))) == 1


def test_forgotten_migration_leaves_no_files(tmp_path: Path) -> None:
    decisions = CommitDecisions(tmp_path)
    decisions.begin(MIGRATION)
    decisions.decide(MIGRATION, CommitDecision.COMMITTED)
    decisions.forget(MIGRATION)
    decisions.forget(MIGRATION)
    assert not decisions.knows(MIGRATION)
    assert list((tmp_path / ".verdicts").iterdir()) == []


def test_arrival_is_recorded_separately_and_removed_with_the_decision(tmp_path: Path) -> None:
    decisions = CommitDecisions(tmp_path)
    decisions.begin(MIGRATION)
    decisions.decide(MIGRATION, CommitDecision.COMMITTED)
    assert not decisions.arrived(MIGRATION)
    decisions.arrive(MIGRATION)
    decisions.arrive(MIGRATION)
    assert CommitDecisions(tmp_path).arrived(MIGRATION)
    assert decisions.decide(MIGRATION, CommitDecision.ABORTED) is CommitDecision.COMMITTED
    decisions.forget(MIGRATION)
    assert not decisions.arrived(MIGRATION)
    assert list((tmp_path / ".verdicts").iterdir()) == []


def test_unrequested_decisions_expire(tmp_path: Path) -> None:
    decisions = CommitDecisions(tmp_path)
    for number in range(3):
        decisions.begin(f"{number:032x}")
        decisions.decide(f"{number:032x}", CommitDecision.ABORTED)
    for file in (tmp_path / ".verdicts").glob(f"{1:032x}.*"):
        old = file.stat().st_mtime - KEPT - 1
        os.utime(file, (old, old))
    decisions.begin(MIGRATION)
    assert [decisions.knows(f"{number:032x}") for number in range(3)] == [True, False, True]
    left = {file.stem for file in (tmp_path / ".verdicts").iterdir()}
    assert left == {f"{0:032x}", f"{2:032x}", MIGRATION}


def test_decision_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".verdicts").write_text("in the way")
    with pytest.raises(WorkloadError, match="cannot write"):
        CommitDecisions(tmp_path).begin(MIGRATION)
    with pytest.raises(WorkloadError, match="cannot record in"):
        CommitDecisions(tmp_path).arrive(MIGRATION)
    with pytest.raises(WorkloadError, match="cannot write"):
        CommitDecisions(tmp_path).decide(MIGRATION, CommitDecision.COMMITTED)
