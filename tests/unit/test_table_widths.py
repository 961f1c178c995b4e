"""Tests of the width of tables: at most 100 columns, also for the longest names and values."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from pageferry import report
from pageferry.host.jobs import Job
from pageferry.large_pages.estimate import Estimate
from pageferry.large_pages.events import LargePagesResult, Overhead, RegionActivity, Sample, StoreFigures
from pageferry.report.tables import WIDTH
from pageferry.sharing.events import Class, Point, ScanReport, SharingResult
from pageferry.workloads.events import EndedWorkload, HostMemory, Listing, Overview, WorkloadInfo, WorkloadMemory

NAME = "a" * 64
REASON = "deferred contents cannot be loaded: " + "the image has been moved, " * 10
MIB, GIB = 1 << 20, 1 << 30


def rendered(view: Any, result: msgspec.Struct) -> str:
    """Return the output on a file, to which tables of any width would be written unchanged."""
    file = io.StringIO()
    Console(file=file, width=500, color_system=None).print(view.result(result))
    return file.getvalue()


def listing() -> Listing:
    info = WorkloadInfo(
        name=NAME,
        kind="arena",
        pid=4194303,
        status="committed",
        reason=REASON,
        memory=1023 * GIB,
        resident=1023 * MIB,
        deferred=1000 * MIB,
        stall_reason=REASON,
    )
    ended = EndedWorkload(
        name=NAME,
        kind="qemu",
        pid=4194303,
        cause="exited",
        time=0.0,
        exact=False,
        exit_code=None,
        signal=None,
        log=True,
        last_line=REASON,
    )
    return Listing([info], [ended])


def overview() -> Overview:
    job = Job(
        pid=1, started=1, verb="large-pages", started_at=0.0, phase="postcopy-paused", fraction=1.0, rate=999 * MIB
    )
    workload = WorkloadMemory(
        name=NAME,
        kind="arena",
        pid=4194303,
        memory=1023 * GIB,
        large=1023 * GIB,
        deferred=1000 * MIB,
        stall_reason=REASON,
        dirty_rate=1000 * MIB,
        jobs=[job, msgspec.structs.replace(job, verb="checkpoint", fraction=None), job],
    )
    host = HostMemory(total=1023 * GIB, available=1, large=1000 * GIB, swap=1000 * GIB, swap_free=1)
    return Overview(time=99999.0, host=host, workloads=[workload])


def large_pages() -> LargePagesResult:
    region = RegionActivity(
        name="/dev/shm/" + NAME, kind="shared", bytes=1023 * GIB, large_pages=99999, sampled=9999, idle=999, mean=511.9
    )
    sample = Sample(
        pid=1, address=0x7FFFFFFFFFFF, region=NAME, kind="shared", activity=512, touched="f" * 128, decision="restore"
    )
    return LargePagesResult(
        target=NAME,
        window_ms=1000.0,
        rounds=9,
        regions=[region],
        samples=[sample],
        histogram=[1] * 11,
        estimate=Estimate(
            large_pages=99999,
            sampled=9999,
            mean=511.9,
            low=511.1,
            high=511.9,
            idle=1000 * GIB,
            idle_low=1,
            idle_high=1000 * GIB,
        ),
        reclaimed=GIB,
        broken=999,
        restored=999,
        not_restored=999,
        overhead=Overhead(cpu_ms=1.0, fraction=0.1, budget=None, faults=9, per_page_us=99.0),
        skipped=[REASON],
        store=StoreFigures(path="/var/" + NAME, bytes=GIB, pages=1, equal=1, written=1, pauses=1, longest_pause_ms=1.0),
    )


def sharing() -> SharingResult:
    return SharingResult(
        workloads=[NAME],
        threshold=1,
        memory=1000 * GIB,
        large_pages=999999,
        already_shared=1000 * GIB,
        classes={name: Class(9999999, 1000 * GIB) for name in ("zero", "pattern", "inside", "across")},
        reclaimable=1000 * GIB,
        possible=1000 * GIB,
        curve=[Point(number * 1000, 1000 * GIB, 1000 * GIB) for number in range(20)],
        scan=ScanReport(1000 * GIB, 99999.0, 16, 16),
        not_shareable=[REASON],
        deferred=1000 * GIB,
    )


@pytest.mark.parametrize(
    ("view", "result"),
    [("WorkloadsView", listing), ("TopView", overview), ("LargePagesView", large_pages), ("SharingView", sharing)],
)
def test_table_and_reasons_fit(view: str, result: Any) -> None:
    lines = rendered(getattr(report, view)(), result()).splitlines()
    assert [line for line in lines if len(line.rstrip()) > WIDTH] == []
    assert "…" not in "".join(lines)
    assert " ".join(REASON.split()) in " ".join(" ".join(lines).split())
