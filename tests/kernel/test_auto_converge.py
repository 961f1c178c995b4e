"""Throttling of workloads that dirty memory faster than the link (`--auto-converge`), and removal of the CPU limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.host.cpu_quota import CpuQuota, mounts
from pageferry.migration.throttle import STEPS
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import Program, wait_until

pytestmark = pytest.mark.usefixtures("root", "quotas")

WILD: dict[str, Any] = {"size": 32 * MIB, "options": {"threads": 2}}
"""Setup of a ledger that writes to all of its memory at full speed."""
SLOW = ("--bandwidth", "100M", "--max-downtime", "50")
AUTO = ("--auto-converge", *SLOW)


@pytest.fixture(scope="module")
def quotas() -> None:
    """Skip the tests if pageferry cannot limit the CPU time of a process."""
    with spinner() as process:
        try:
            CpuQuota([process.process.pid]).close()
        except WorkloadError as error:
            pytest.skip(f"cannot limit CPU time: {error}")


def spinner() -> Program:
    return Program("-c", "while True: pass")


def groups(pid: int) -> list[str]:
    """Return a process's control groups that can limit CPU time. Its other groups may change during the test."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return [line for line in lines if {"cpu", ""} & set(line.split(":")[1].split(","))]


def left_over() -> list[Path]:
    """Return the control groups that pageferry has created and not removed, in all hierarchies."""
    return [group for mount in mounts() for group in mount.point.rglob("pageferry-*")]


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    wait_until(lambda: not left_over(), "the removal of all CPU limits")


def test_throttled_precopy_converges() -> None:
    with moving.ledger("here", **WILD) as here, moving.receiver("there") as there:
        before = groups(here.process.pid)
        with moving.migrating("here", moving.address_of(there), *AUTO) as migration:
            said = moving.until(migration, "round")
            assert said["cpu-throttle-percentage"] == 0
            rounds = [said]
            while said["type"] != "migration":
                said = migration.json()
                rounds += [said] if said["type"] == "round" and not said["switch-over"] else []
            assert migration.wait() == 0
        steps = [each["cpu-throttle-percentage"] for each in rounds]
        assert steps == sorted(steps)
        assert set(steps) <= {0, *STEPS}
        assert said["cpu-throttle-percentage"] == steps[-1] > 0
        assert said["mode"] == "precopy"
        assert groups(here.process.pid) == before
        moving.until(there, "received")
        moving.runs("there")
        moving.ends_intact(here, "moved")
        moving.is_intact(there)


@pytest.mark.parametrize("fault", ["source.throttled=kill", "source.paused=kill", ""])
def test_limit_is_removed_after_failed_migration(fault: str) -> None:
    """Either the source is killed, and only its guardian can remove the limit, or the migration fails in round 3."""
    with moving.ledger("here", **WILD) as here, moving.receiver("there") as there:
        pid, before = here.process.pid, groups(here.process.pid)
        options = AUTO if fault else (*AUTO, "--max-rounds", "3")
        with moving.migrating("here", moving.address_of(there), *options, fault=fault or None) as migration:
            code = migration.wait()
            assert code == (-signal.SIGKILL if fault else 24)
        wait_until(lambda: groups(pid) == before, "the original control group")
        moving.runs("here")
        moving.ends_intact(here)


def test_converging_workload_is_not_throttled() -> None:
    with moving.ledger("here") as here, moving.receiver("there") as there:
        with moving.migrating("here", moving.address_of(there), "--auto-converge") as migration:
            assert moving.until(migration, "migration")["cpu-throttle-percentage"] == 0
            assert migration.wait() == 0
        moving.ends_intact(here, "moved")


def test_quota_limits_cpu_time_until_closed() -> None:
    with spinner() as one, spinner() as other:
        pids = [one.process.pid, other.process.pid]
        before = list(map(groups, pids))
        quota = CpuQuota(pids)
        quota.limit(0.1)
        used = sum(map(proc.cpu_seconds, pids))
        subprocess.run([sys.executable, "-c", "import time; time.sleep(2)"], check=True, timeout=60)
        # 0.2 s (10 % of 2 s), and the remainder of the quota period in which the limit was set.
        assert sum(map(proc.cpu_seconds, pids)) - used < 0.6
        quota.close()
        assert list(map(groups, pids)) == before
        used = sum(map(proc.cpu_seconds, pids))
        wait_until(lambda: sum(map(proc.cpu_seconds, pids)) > used + 0.6, "more CPU time than the limit allowed")


def test_quota_of_own_or_exited_process_is_refused() -> None:
    with pytest.raises(WorkloadError, match="it runs in this process"):
        CpuQuota([os.getpid()])
    with spinner() as gone:
        gone.kill()
        with pytest.raises(WorkloadDied):
            CpuQuota([gone.process.pid])


def test_auto_converge_requires_precopy() -> None:
    with moving.ledger("here"), moving.migrating("here", "127.0.0.1:1", *AUTO, "--mode", "hybrid") as migration:
        assert migration.wait() == 2
