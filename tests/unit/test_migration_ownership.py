"""Tests of a destination's decisions: the first is final for all processes, and stays while a source may request it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pageferry.errors import WorkloadError
from pageferry.migration.ownership import KEPT, Verdict, Verdicts

MIGRATION = "0123456789abcdef" * 2


def test_first_decision_is_final(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    verdicts.begin(MIGRATION)
    assert verdicts.decide(MIGRATION, Verdict.COMMITTED) is Verdict.COMMITTED
    assert verdicts.decide(MIGRATION, Verdict.ABORTED) is Verdict.COMMITTED
    # A process that starts later reads the same decision.
    assert Verdicts(tmp_path).decide(MIGRATION, Verdict.ABORTED) is Verdict.COMMITTED


def test_only_begun_migrations_are_known(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path / "not" / "there")
    assert not verdicts.knows(MIGRATION)
    verdicts.begin(MIGRATION)
    assert verdicts.knows(MIGRATION)
    assert not verdicts.knows("f" * 32)


def test_concurrent_processes_get_the_same_decision(tmp_path: Path) -> None:
    """Separate processes decide, as two receivers on a host may do."""
    rounds = [f"{number:032x}" for number in range(20)]
    for migration in rounds:
        Verdicts(tmp_path).begin(migration)
    children = []
    for wanted in (Verdict.COMMITTED, Verdict.ABORTED) * 2:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            heard = "".join(Verdicts(tmp_path).decide(migration, wanted).value[0] for migration in rounds)
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
    verdicts = Verdicts(tmp_path)
    verdicts.begin(MIGRATION)
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(lambda v: verdicts.decide(MIGRATION, v), list(Verdict) * 8))) == 1


def test_forgotten_migration_leaves_no_files(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    verdicts.begin(MIGRATION)
    verdicts.decide(MIGRATION, Verdict.COMMITTED)
    verdicts.forget(MIGRATION)
    verdicts.forget(MIGRATION)
    assert not verdicts.knows(MIGRATION)
    assert list((tmp_path / ".verdicts").iterdir()) == []


def test_arrival_is_recorded_separately_and_removed_with_the_decision(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    verdicts.begin(MIGRATION)
    verdicts.decide(MIGRATION, Verdict.COMMITTED)
    assert not verdicts.arrived(MIGRATION)
    verdicts.arrive(MIGRATION)
    verdicts.arrive(MIGRATION)
    assert Verdicts(tmp_path).arrived(MIGRATION)
    assert verdicts.decide(MIGRATION, Verdict.ABORTED) is Verdict.COMMITTED
    verdicts.forget(MIGRATION)
    assert not verdicts.arrived(MIGRATION)
    assert list((tmp_path / ".verdicts").iterdir()) == []


def test_unrequested_decisions_expire(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    for number in range(3):
        verdicts.begin(f"{number:032x}")
        verdicts.decide(f"{number:032x}", Verdict.ABORTED)
    for file in (tmp_path / ".verdicts").glob(f"{1:032x}.*"):
        old = file.stat().st_mtime - KEPT - 1
        os.utime(file, (old, old))
    verdicts.begin(MIGRATION)
    assert [verdicts.knows(f"{number:032x}") for number in range(3)] == [True, False, True]
    left = {file.stem for file in (tmp_path / ".verdicts").iterdir()}
    assert left == {f"{0:032x}", f"{2:032x}", MIGRATION}


def test_decision_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".verdicts").write_text("in the way")
    with pytest.raises(WorkloadError, match="cannot write"):
        Verdicts(tmp_path).begin(MIGRATION)
    with pytest.raises(WorkloadError, match="cannot record in"):
        Verdicts(tmp_path).arrive(MIGRATION)
    with pytest.raises(WorkloadError, match="cannot write"):
        Verdicts(tmp_path).decide(MIGRATION, Verdict.COMMITTED)
