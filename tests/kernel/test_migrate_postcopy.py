"""Post-copy and hybrid migration of a ledger, which runs at the destination before all of its pages are present."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pageferry.host.registry import Registry
from pageferry.workloads.lifecycle import Status
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import DEADLINE, Program, wait_until
from tests.saved import check_ledger

pytestmark = pytest.mark.usefixtures("root")


def all_there(program: Program) -> dict[str, Any]:
    """Wait until all pages are present, stop the receiver, and check that no write was lost. Return its report."""
    wait_until(lambda: deferred("there") == 0, "all pages to be present")
    program.process.terminate()
    end = moving.until(program, "ledger")
    assert end["intact"], end
    return end


def listed(name: str) -> dict[str, Any]:
    """Return the entry of a workload in `pageferry list`."""
    command = [sys.executable, "-m", "pageferry", "list", "--output", "json"]
    said = subprocess.run(command, check=True, timeout=DEADLINE, capture_output=True, text=True).stdout
    return next(one for one in map(json.loads, said.splitlines()) if one["name"] == name)


def deferred(name: str) -> int:
    """Return the number of deferred bytes of a workload, as `pageferry list` reports it."""
    return int(listed(name)["deferred"])


def moves(*options: str, setup: dict[str, Any] | None = None) -> dict[str, Any]:
    """Migrate a ledger, and check that no write was lost. Return the result of `pageferry migrate`."""
    with moving.ledger("here", **(setup or {})) as here, moving.receiver("there") as there:
        with moving.migrating("here", moving.address_of(there), *options) as migration:
            result = moving.until(migration, "migration")
            assert migration.wait() == 0
        moving.until(there, "received")
        moving.runs("there")
        moving.ends_intact(here, "moved")
        all_there(there)
    return result


BUSY = {"options": {"threads": 2, "rate": None, "zero_fraction": 0.2, "compressible": 0.3, "fill": 0.9}}


@pytest.mark.parametrize("options", ["", "--streams 3 --codec lz4", "--codec zstd --large-pages ignore"])
def test_postcopy_sends_no_page_before_the_switch_over(options: str) -> None:
    result = moves("--mode", "postcopy", *options.split(), setup=BUSY)
    assert (result["mode"], result["status"], result["dirty-sync-count"]) == ("postcopy", "completed", 0)
    late = result["postcopy"]
    assert 0 < late["pages"] <= result["memory"] // 4096
    # Each page is sent once, and a second time if the destination requests it while it is in transit.
    assert late["pages"] <= result["normal"] + result["duplicate"] <= late["pages"] + result["postcopy-requests"] * 16
    assert 0 < result["postcopy-requests"] <= late["pages"]
    assert 0 < late["time"] < result["total-time"]
    if "ignore" not in options:
        assert result["large-pages"]["destination"] == result["large-pages"]["source"]


def test_hybrid_completes_although_workload_writes_faster_than_the_link() -> None:
    """The remaining pages never fit the downtime. They are sent after the switch-over, and few of them twice."""
    result = moves("--mode", "hybrid", "--max-downtime", "0", setup=BUSY)
    assert result["mode"] == "hybrid"
    assert result["dirty-sync-count"] >= 2
    assert 0 < result["postcopy"]["pages"] < result["memory"] // 4096
    assert result["normal"] + result["duplicate"] <= 2.5 * result["memory"] // 4096


def test_hybrid_switches_over_early_in_a_futile_first_round() -> None:
    """The workload writes to all memory repeatedly while the first half is sent."""
    result = moves("--mode", "hybrid", "--bandwidth", "16M", setup=BUSY)
    late, memory = result["postcopy"]["pages"], result["memory"] // 4096
    assert late > 0.7 * memory
    assert result["normal"] + result["duplicate"] <= 1.8 * memory


def test_hybrid_stays_precopy_if_it_converges() -> None:
    result = moves("--mode", "hybrid", setup={"options": {"threads": 2, "rate": MIB}})
    assert (result["mode"], result["postcopy"], result["postcopy-requests"]) == ("hybrid", None, 0)


def test_hybrid_switches_over_on_request() -> None:
    with moving.ledger("here", options={"threads": 2, "rate": MIB}) as here, moving.receiver("there") as there:
        address = moving.address_of(there)
        fault = "source.between-rounds=stop"
        with moving.migrating("here", address, "--mode", "hybrid", fault=fault) as migration:
            moving.stopped(migration)
            subprocess.run([sys.executable, "-m", "pageferry", "migrate", "--switch", "here"], check=True, timeout=60)
            migration.process.send_signal(signal.SIGCONT)
            result = moving.until(migration, "migration")
            assert migration.wait() == 0
        assert result["postcopy"] is not None
        moving.ends_intact(here, "moved")
        all_there(there)


def test_switch_request_without_hybrid_migration_is_refused() -> None:
    with moving.ledger("here"), moving.migrating("here", "--switch") as migration:
        assert migration.wait() == 2


def test_receiver_waits_for_the_source_after_a_lost_link() -> None:
    """No write is lost, no page becomes zeros, and received pages are not sent again."""
    with moving.ledger("here", size=64 * MIB, options=BUSY["options"]) as here, moving.receiver("there") as there:
        address = moving.address_of(there)
        with moving.migrating("here", address, "--mode", "postcopy", fault="source.answered=drop") as migration:
            assert moving.until(migration, "postcopy")["status"] == "postcopy-paused"
            assert migration.wait() == 28
        moving.until(there, "received")
        while moving.until(there, "postcopy")["status"] != "postcopy-paused":
            pass
        assert moving.status("here") is Status.COMMITTED
        there_now = listed("there")
        assert there_now["deferred"] > 0
        assert "link" in there_now["stall-reason"]
        with moving.migrating("here", address) as again:
            assert again.wait() == 10
        with moving.migrating("here", "--recover") as recovery:
            assert moving.until(recovery, "recovery")["owner"] == "destination"
            assert recovery.wait() == 0
        moving.ends_intact(here, "moved")
        moving.runs("there")
        all_there(there)


@contextmanager
def arriving() -> Iterator[tuple[Program, Program, Program]]:
    """Yield the source of a ledger, its receiver, and the post-copy migration between them.

    The ledger already runs in the receiver. The bandwidth limit makes the migration take several seconds more.
    """
    slowly = ("--mode", "postcopy", "--bandwidth", "12M")
    with (
        moving.ledger("here", size=64 * MIB) as here,
        moving.receiver("there") as there,
        moving.migrating("here", moving.address_of(there), *slowly) as migration,
    ):
        moving.until(there, "received")
        yield here, there, migration


def test_workload_can_be_peeked_and_saved_during_postcopy(tmp_path: Path) -> None:
    """`peek` waits only for the pages that it reads, `checkpoint` waits for all pages."""
    with arriving() as (here, there, migration):
        peek = [sys.executable, "-m", "pageferry", "peek", "there", "0", "4096", "--output", "json"]
        seen = json.loads(subprocess.run(peek, check=True, timeout=DEADLINE, capture_output=True).stdout)
        assert set(seen["data"]) != {"0"}
        with Program("-m", "pageferry", "checkpoint", "there", str(tmp_path / "image")) as saver:
            assert deferred("there") > 0
            assert saver.wait() == 0
        check_ledger(tmp_path / "image")
        assert migration.wait() == 0
        moving.ends_intact(here, "moved")
        moving.runs("there")
        all_there(there)


def test_workload_can_be_migrated_again_during_postcopy() -> None:
    with arriving() as (here, there, migration), moving.receiver("further") as further:
        with moving.migrating("there", moving.address_of(further)) as onward:
            assert deferred("there") > 0
            assert onward.wait() == 0
        moving.until(further, "received")
        moving.runs("further")
        assert migration.wait() == 0
        moving.ends_intact(here, "moved")
        moving.until(there, "ledger")
        further.process.terminate()
        assert moving.until(further, "ledger")["intact"]
    assert Registry().entries() == {}
