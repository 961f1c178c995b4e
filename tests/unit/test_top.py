"""Tests of the progress records of running verbs, and of the view of all workloads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pageferry.checkpoints.events import InstantEvent, ProgressEvent, RunningEvent, SavingEvent
from pageferry.cli.main import main
from pageferry.host import jobs, proc
from pageferry.host.jobs import Job
from pageferry.host.registry import ArenaEntry, Registry
from pageferry.migration import events as migration
from pageferry.report.progress import INTERVAL, Progress
from pageferry.report.top import TopView
from pageferry.workloads.inventory import overview


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("PAGEFERRY_RUN_DIR", str(tmp_path / "run"))
    return Registry()


@pytest.fixture
def web(registry: Registry) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process with 8 MiB of private memory that is registered as the arena `web`."""
    program = "import sys; data = bytearray(b'x' * (8 << 20)); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        started = proc.start_time(process.pid)
        assert started is not None
        registry.claim("web").publish(ArenaEntry(pid=process.pid, started=started, control_socket="/nowhere"))
        yield process
        process.kill()


def ended() -> Job:
    """Return the job record of a process that has exited."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        started = proc.start_time(process.pid) or 1
    return Job(pid=process.pid, started=started, verb="migrate", started_at=1.0)


def test_jobs_are_listed_while_their_process_runs(tmp_path: Path) -> None:
    ours = jobs.ours("checkpoint", 5.0)
    jobs.write(tmp_path, ours)
    jobs.write(tmp_path, ended())
    (tmp_path / "job-1.json").write_text("{")
    (tmp_path / "job-2.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(ours, version=99)))
    assert jobs.running(tmp_path) == [ours]
    assert not (tmp_path / f"job-{ended().pid}.json").exists()
    jobs.remove(tmp_path, ours.pid)
    assert jobs.running(tmp_path) == []


def test_job_of_a_removed_workload_is_not_written(tmp_path: Path) -> None:
    jobs.write(tmp_path / "gone", jobs.ours("migrate", 1.0))
    assert list(tmp_path.iterdir()) == []
    assert jobs.running(tmp_path / "gone") == []


def test_progress_is_written_periodically_and_removed_at_the_end(registry: Registry) -> None:
    folder = registry.path / "web"
    folder.mkdir(parents=True)
    now = 100.0
    with Progress("migrate", ["web"], lambda: now) as progress:
        assert jobs.running(folder)[0].phase == "starting"
        progress.event(migration.ProgressEvent(round=1, done=10, total=100, mbps=80.0))
        (job,) = jobs.running(folder)
        assert (job.verb, job.phase, job.fraction, job.rate) == ("migrate", "round 1", 0.1, 10_000_000)
        progress.event(migration.ProgressEvent(round=1, done=20, total=100, mbps=80.0))
        assert jobs.running(folder) == [job]
        now += INTERVAL
        progress.event(migration.ProgressEvent(round=1, done=30, total=100, mbps=80.0))
        assert jobs.running(folder)[0].fraction == 0.3
    assert list(folder.iterdir()) == []


def test_progress_of_checkpoint_and_restore(registry: Registry) -> None:
    progress = Progress("checkpoint", ["web"])
    progress.event(InstantEvent(downtime=1.0))
    assert (progress.job.phase, progress.job.fraction) == ("saving", None)
    progress.event(SavingEvent(done=0, total=0, traps=0, stored=0))
    assert progress.job.fraction == 1.0
    progress = Progress("restore", ["web"])
    progress.event(RunningEvent(workload="web", time_to_running=1.0, deferred=400))
    progress.event(ProgressEvent(deferred=100, faults=1, missed=1, prefetched=1, bytes_read=1, failures=[]))
    assert (progress.job.phase, progress.job.fraction) == ("loading", 0.75)


def test_top_shows_memory_and_jobs(
    registry: Registry, web: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    job = msgspec.structs.replace(jobs.ours("migrate", 5.0), phase="round 2", fraction=0.5, dirty_rate=3 << 20)
    jobs.write(registry.path / "web", job)
    assert main(["top", "--once", "--output", "json"]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    (found,) = line["workloads"]
    assert (line["type"], found["name"], found["kind"], found["pid"]) == ("top", "web", "arena", web.pid)
    assert 8 << 20 < found["memory"] < line["host"]["total"]
    assert 0 <= found["large"] <= found["memory"]
    assert (found["deferred"], found["dirty-rate"]) == (0, 3 << 20)
    assert [one["pid"] for one in found["jobs"]] == [os.getpid()]
    assert main(["top", "--once"]) == 0
    out = capsys.readouterr().out
    for words in ("web", "migrate", "round 2", "50%", "3 MiB/s", "in use"):
        assert words in out


def test_top_runs_until_terminated(registry: Registry, web: subprocess.Popen[bytes]) -> None:
    command = [sys.executable, "-m", "pageferry", "top", "--interval", "100ms", "--output", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(3):
            assert json.loads(child.stdout.readline())["workloads"][0]["name"] == "web"
        child.terminate()
        child.communicate(timeout=60)
    assert child.returncode == 143


def test_top_without_workloads_says_so(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once"]) == 0
    assert "no workloads" in capsys.readouterr().out
    now = overview(registry)
    assert now.workloads == []
    assert "no workloads" in (TopView().line(now) or "")


def test_running_verb_has_a_job_until_it_ends(registry: Registry, web: subprocess.Popen[bytes]) -> None:
    command = [sys.executable, "-m", "tests.unit.verbs.command", "lister", "--steps", "1", "--linger", "web"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"asleep\n"
        (job,) = jobs.running(registry.path / "web")
        assert (job.pid, job.verb) == (child.pid, "lister")
        child.terminate()
        child.communicate(timeout=60)
    assert jobs.running(registry.path / "web") == []
    assert sorted(path.name for path in (registry.path / "web").iterdir()) == ["workload.json"]
