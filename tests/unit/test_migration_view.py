"""Tests of the human-readable output of a migration."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from pageferry.demo.events import DemoResult
from pageferry.events import Event, Latency
from pageferry.migration import events
from pageferry.report.migration import DemoView, MigrationView
from pageferry.report.text import HumanReporter

SETUP = events.SetupEvent(peer="[::1]:7070", memory=512 << 20, present=300 << 20, large_pages=150, install_ms=1.5)
ROUND = events.RoundEvent(
    round=1, pages=131072, sent=200 << 20, remaining=10 << 20, ms=500.0, mbps=3355.4, dirty_rate=20 << 20
)
PROGRESS = events.ProgressEvent(round=2, done=30, total=120, mbps=838.9)
RESULT = events.MigrationResult(
    status="completed",
    mode="precopy",
    workload="web",
    peer="[::1]:7070",
    total_time=1250.0,
    setup_time=12.3,
    downtime=15.25,
    downtime_parts=events.Downtime(
        total=15.25, stop=0.5, last_pages=3.2, device_state=4.5, populate=0.25, resume=0.125
    ),
    transferred=210 << 20,
    memory=512 << 20,
    normal=53760,
    duplicate=2000,
    skipped=75312,
    dirty_sync_count=3,
    mbps=1409.3,
    large_pages=events.LargePageCount(source=150, destination=148, fallbacks=2),
    populated=events.PopulateCount(mode="all", large=148, small=1024, failed=0, work_ms=8.0),
    faults_after_resume=events.FaultCount(minor=7, major=0),
    trace=events.TraceCount(granularity="auto", install_ms=1.5, released_units=0),
)
TABLE = """\
migration                   web completed, running at [::1]:7070
total time                  1.2 s (set-up 12.3 ms)
downtime                    15.2 ms: stop 500 us, last pages 3.2 ms, state 4.5 ms, populate 250 us, resume 125 us
transferred                 210 MiB of 512 MiB at 168 MiB/s: 53,760 pages, 2,000 zero pages, 75,312 not present
trace                       auto, installed in 1.5 ms; collected 3 times
huge pages                  150 at the source, 148 at the destination, 2 not preserved
populated                   all: 148 huge and 1,024 base pages in 8.0 ms
faults in the first second  7 minor, 0 major
"""


def shown(view: MigrationView, *told: Event, result: Event | None = None) -> tuple[str, str]:
    """Return the output on stdout and on stderr without a terminal."""
    data, progress = (Console(file=io.StringIO(), width=200, color_system=None) for _ in range(2))
    with HumanReporter(view, data, progress) as reporter:
        for event in told:
            reporter.event(event)
        if result is not None:
            reporter.final(result)
    texts = [console.file.getvalue() for console in (data, progress)]  # type: ignore[attr-defined]
    return texts[0], texts[1]


def stripped(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def test_output_without_a_terminal_is_a_line_per_round_and_a_table() -> None:
    data, progress = shown(MigrationView(), SETUP, PROGRESS, ROUND, PROGRESS, result=RESULT)
    assert progress == (
        "to [::1]:7070: 300 MiB of 512 MiB present, 150 huge pages, write traces installed in 1.5 ms\n"
        "round 1: 131,072 pages, 200 MiB in 500.0 ms (400 MiB/s), modified 20 MiB/s, 10 MiB remaining\n"
    )
    assert stripped(data) == TABLE


def test_postcopy_has_a_line_per_status_change_and_a_table_row() -> None:
    def event(status: events.PostcopyStatus) -> events.PostcopyEvent:
        return events.PostcopyEvent(status=status, remaining=10 << 20, postcopy_requests=1234, mbps=8.0)

    waits = Latency.of([0, 0, 0, 0, 0, 0, 0, 1200, 30, 0, 0, 4], 2100.0)
    late = events.PostcopyCount(time=750.0, pages=2560, faults=1234, service_us=150.0, waits=waits)
    result = msgspec.structs.replace(RESULT, mode="postcopy", postcopy=late, postcopy_requests=1234)
    told = [event("postcopy-active"), event("postcopy-paused"), event("postcopy-recover")]
    data, progress = shown(MigrationView(), *told, result=result)
    assert progress == (
        "postcopy-paused: the workload waits at the destination for deferred pages\npostcopy-recover: reconnected\n"
    )
    assert (
        "post-copy                   2,560 pages in 750.0 ms, 1,234 requests; 1,234 faults, mean 150 us, p99 256 us, "
        "maximum 2.1 ms\n"
    ) in stripped(data)
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(MigrationView().live(event("postcopy-active")))
    shown_live = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown_live.strip() == "postcopy-active: 10 MiB deferred, 1,234 pages requested"


@pytest.mark.parametrize(("intact", "words"), [(True, "no lost writes"), (False, "WRITES LOST")])
def test_demo_reports_lost_writes(intact: bool, words: str) -> None:
    fields = {name: getattr(RESULT, name) for name in RESULT.__struct_fields__}
    data, _ = shown(DemoView(), result=DemoResult(**fields, intact=intact, writes=150000, checked=130813))
    assert stripped(data) == TABLE + f"{words}: 150,000 writes, 130,813 pages verified\n"


def test_terminal_shows_rounds_and_a_progress_bar() -> None:
    view = MigrationView()
    console = Console(file=io.StringIO(), width=100, color_system=None)
    for event in (SETUP, ROUND, PROGRESS):
        content = view.live(event)
        assert content is not None
    console.print(content)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split(":")[0].strip() for line in lines[:2]] == ["to [", "round 1"]
    assert lines[2].startswith("round 2 ━━━━")
    assert lines[2].rstrip().endswith("100 MiB/s")
    assert len(lines) == 3
    # Between rounds, neither a bar nor an empty line is shown.
    content = view.live(ROUND)
    console = Console(file=io.StringIO(), width=100, color_system=None)
    assert content is not None
    console.print(content)
    assert all(line.strip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
