"""Tests of interrupted checkpoints with a write trace: the next checkpoint never relies on an incomplete trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pageferry.host.registry import Registry
from pageferry.workloads import persistent_trace
from pageferry.workloads.persistent_trace import LeftTrace
from tests.kernel import moving
from tests.kernel.programs import Program
from tests.saved import check_ledger

MIB = 1 << 20


@contextmanager
def ledger(name: str) -> Iterator[Program]:
    options = {"threads": 2, "zero_fraction": 0.2, "working_set": 0.1}
    setup = {"name": name, "size": 16 * MIB, "options": options, "exact": True}
    with Program("-m", "pageferry.demo.process", json.dumps(setup)) as program:
        program.json()
        yield program


def stop(program: Program) -> None:
    program.process.send_signal(signal.SIGTERM)
    assert program.json()["intact"]
    assert program.wait() == 0


def run(name: str, image: Path, *options: str, fault: str | None = None, code: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "pageferry", "checkpoint", name, str(image), "--output", "json", *options]
    environment = os.environ | ({"PAGEFERRY_FAULT": f"{fault}=kill"} if fault is not None else {})
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert done.returncode == code, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if code == 0 else {}
    return result


def userfaultfds(pid: int) -> int:
    """Return the number of userfaultfds of a process."""
    folder = f"/proc/{pid}/fd"
    return sum(os.readlink(f"{folder}/{number}") == "anon_inode:[userfaultfd]" for number in os.listdir(folder))


def test_tracked_chain_uses_the_trace_of_the_previous_checkpoint(tmp_path: Path) -> None:
    with ledger("chained") as program:
        run("chained", tmp_path / "0", "--track")
        assert userfaultfds(program.process.pid) == 1
        for number in range(1, 4):
            result = run("chained", tmp_path / str(number), "--parent", str(tmp_path / str(number - 1)))
            assert (result["tracking"], result["tracked"]) == ("trace", True), result["tracking-note"]
        run("chained", tmp_path / "4", "--parent", str(tmp_path / "3"), "--no-track")
        assert userfaultfds(program.process.pid) == 0
        stop(program)
    for number in range(5):
        check_ledger(tmp_path / str(number))


@pytest.mark.parametrize(
    "point",
    [
        "checkpoint.trace-taken",
        "checkpoint.armed",
        "checkpoint.instant",
        "checkpoint.saved",
        "checkpoint.published",
        "checkpoint.trace-left",
    ],
)
def test_checkpoint_after_one_killed_with_a_trace_compares_pages(tmp_path: Path, point: str) -> None:
    with ledger("chained") as program:
        run("chained", tmp_path / "0", "--track")
        run("chained", tmp_path / "1", "--parent", str(tmp_path / "0"), fault=point, code=-signal.SIGKILL)
        result = run("chained", tmp_path / "2", "--parent", str(tmp_path / "0"))
        assert (result["tracking"], result["tracked"]) == ("compare", True)
        assert "did not finish" in result["tracking-note"]
        assert userfaultfds(program.process.pid) == 1
        result = run("chained", tmp_path / "3", "--parent", str(tmp_path / "2"))
        assert result["tracking"] == "trace"
        stop(program)
    for number in (2, 3):
        check_ledger(tmp_path / str(number))


@pytest.mark.parametrize(
    "point", ["checkpoint.trace-begun", "checkpoint.armed", "checkpoint.instant", "checkpoint.saved"]
)
def test_trace_of_a_killed_first_checkpoint_is_replaced(tmp_path: Path, point: str) -> None:
    with ledger("chained") as program:
        run("chained", tmp_path / "0", "--track", fault=point, code=-signal.SIGKILL)
        assert sorted(os.listdir(tmp_path)) == []
        result = run("chained", tmp_path / "1", "--track")
        assert result["tracked"]
        assert userfaultfds(program.process.pid) == 1
        result = run("chained", tmp_path / "2", "--parent", str(tmp_path / "1"))
        assert result["tracking"] == "trace"
        stop(program)
    check_ledger(tmp_path / "2")


def test_trace_record_of_another_process_is_ignored(tmp_path: Path) -> None:
    """The workload is restarted under the same name, and the old record is restored."""
    with ledger("chained") as program:
        run("chained", tmp_path / "0", "--track")
        kept = Registry().folder("chained").load(persistent_trace.RECORD, LeftTrace)
        assert kept is not None
        stop(program)
    with ledger("chained") as program:
        Registry().folder("chained").store(persistent_trace.RECORD, kept)
        result = run("chained", tmp_path / "1", "--parent", str(tmp_path / "0"))
        assert result["tracking"] == "compare"
        stop(program)
    check_ledger(tmp_path / "1")


def test_workload_with_a_persistent_trace_is_migrated(tmp_path: Path) -> None:
    """The migration removes the persistent trace and installs another trace."""
    with ledger("chained") as program, moving.receiver("moved") as there:
        run("chained", tmp_path / "0", "--track")
        with moving.migrating("chained", moving.address_of(there)) as migration:
            assert moving.until(migration, "migration")["status"] == "completed"
        assert there.json()["type"] == "received"
        result = run("moved", tmp_path / "1", "--parent", str(tmp_path / "0"))
        assert result["tracking"] == "compare"
        assert result["pages"]["in-parent"] > 0
        assert program.wait() == 0
    check_ledger(tmp_path / "1")


def test_sampling_removes_a_persistent_trace(tmp_path: Path) -> None:
    with ledger("chained") as program:
        run("chained", tmp_path / "0", "--track")
        sampled = [sys.executable, "-m", "pageferry", "large-pages", "chained", "--output", "json"]
        assert subprocess.run(sampled, capture_output=True, timeout=60).returncode == 0
        assert userfaultfds(program.process.pid) == 0
        assert run("chained", tmp_path / "1", "--parent", str(tmp_path / "0"))["tracking"] == "compare"
        stop(program)
    check_ledger(tmp_path / "1")
