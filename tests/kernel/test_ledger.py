"""Python binding of the ledger: threads that write, and detection of damage."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import pytest

from pageferry import _engine
from pageferry.workloads.arena.arena import Arena
from tests.kernel.programs import Program, wait_until

MIB = 1 << 20
PAGE = 4096


def run_and_pause(ledger: _engine.Ledger, writes: int = 2000) -> None:
    goal = sum(ledger.writes()) + writes
    if ledger.state == "stopped":
        ledger.start()
    else:
        ledger.resume()
    wait_until(lambda: sum(ledger.writes()) >= goal, f"{writes} writes")
    ledger.pause()
    assert ledger.state == "paused"


def test_ledger_writes_and_stays_intact() -> None:
    ledger = _engine.Ledger.create(Arena(8 * MIB), threads=2, zero_fraction=0.3)
    for _ in range(5):
        run_and_pause(ledger)
        report = ledger.verify()
        assert report.intact
        assert report.checked == report.pages == ledger.filled == ledger.pages
        assert report.writes == report.versions == sum(ledger.writes())
        assert 0 < report.zeros < report.checked
        assert ledger.digest() == ledger.digest(threads=3)
    stalls = ledger.stalls(reset=True)
    assert stalls.longest > 0
    assert sum(stalls.histogram) >= 10000
    again = ledger.stalls()
    assert (again.longest, again.histogram) == (0, [0] * len(stalls.histogram))


def test_options_are_stored_in_memory() -> None:
    options = {
        "threads": 3,
        "seed": 2**64 - 1,
        "rate": 10 * MIB,
        "working_set": 0.5,
        "scatter": True,
        "skew": 2.5,
        "zero_fraction": 0.25,
        "fill": 0.75,
        "compressible": 0.5,
    }
    arena = Arena(4 * MIB)
    made = _engine.Ledger.create(arena, **options)  # type: ignore[arg-type]
    found = _engine.Ledger.attach(arena)
    assert made.options == found.options == options
    assert found.fingerprint() == made.fingerprint()


def test_threads_write_concurrently() -> None:
    ledger = _engine.Ledger.create(Arena(MIB), threads=3)
    assert ledger.tids == []
    ledger.start(paused=True)
    assert {str(tid) for tid in ledger.tids} < set(os.listdir("/proc/self/task"))
    ledger.stop()
    assert (ledger.tids, ledger.state) == ([], "stopped")


def test_invalid_calls_are_refused() -> None:
    arena = Arena(MIB)
    with pytest.raises(ValueError, match="not a ledger"):
        _engine.Ledger.attach(arena)
    with pytest.raises(ValueError, match="invalid working_set 2"):
        _engine.Ledger.create(arena, working_set=2)
    with pytest.raises(ValueError, match="too small"):
        _engine.Ledger.create(arena, threads=200)
    ledger = _engine.Ledger.create(arena, threads=2)
    with pytest.raises(ValueError, match=r"partitions 1\.\.3"):
        _engine.Ledger.attach(arena, first_thread=1, threads=2)
    with pytest.raises(RuntimeError, match="stopped"):
        ledger.pause()
    with pytest.raises(ValueError, match="body page"):
        ledger.page_offset(ledger.pages)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("lost", lambda page, other: bytes(PAGE)),
        ("misplaced", lambda page, other: other),
        ("torn", lambda page, other: page[: PAGE // 2] + other[PAGE // 2 :]),
        ("torn", lambda page, other: page[:-1] + bytes([page[-1] ^ 1])),
    ],
)
def test_damage_is_detected(kind: str, damage: Callable[[bytes, bytes], bytes]) -> None:
    arena = Arena(4 * MIB)
    ledger = _engine.Ledger.create(arena, threads=2)
    run_and_pause(ledger)
    before = ledger.digest()
    memory = memoryview(arena)
    first, second = (slice(at, at + PAGE) for at in (ledger.page_offset(100), ledger.page_offset(101)))
    memory[first] = damage(bytes(memory[first]), bytes(memory[second]))
    report = ledger.verify()
    assert not report.intact
    assert (getattr(report, kind), report.first_bad) == (1, 100)
    assert ledger.digest() != before


def test_stale_page_is_detected() -> None:
    arena = Arena(MIB)
    ledger = _engine.Ledger.create(arena)
    memory = memoryview(arena)
    page = slice(ledger.page_offset(7), ledger.page_offset(7) + PAGE)
    old = bytes(memory[page])
    while bytes(memory[page]) == old:
        run_and_pause(ledger)
    memory[page] = old
    report = ledger.verify()
    assert (report.stale, report.first_bad) == (1, 7)
    run_and_pause(ledger, 20000)
    report = ledger.verify()
    assert (report.stale, report.overwritten, report.first_bad, report.intact) == (0, 1, 7, False)


def test_unfilled_memory_is_not_allocated() -> None:
    arena = Arena(256 * MIB, large_pages=False)
    ledger = _engine.Ledger.create(arena, threads=4, fill=0.1)
    run_and_pause(ledger)
    assert ledger.verify().intact
    ledger.digest()
    data = sum(end - start for start, end in arena.data_ranges())
    assert 25 * MIB < data < 28 * MIB


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(("fraction", "large"), [(None, 16), (1.0, 16), (0.25, 4), (0.0, 0)])
def test_large_fraction_limits_large_pages(fraction: float | None, large: int) -> None:
    arena = Arena(32 * MIB)
    ledger = _engine.Ledger.create(arena, large_fraction=fraction)
    assert ledger.verify().intact
    # Count in a second mapping: the arena's own mapping maps units that must stay base pages by PTEs in any case.
    assert sum(_engine.Mapping(arena.fileno(), arena.length).large_units()) == large


def test_keyboard_interrupt_ends_a_long_call() -> None:
    script = """
import threading, time
from pageferry import _engine
from pageferry.workloads.arena.arena import Arena
arena = Arena(64 << 30, large_pages=False)
print("filling", flush=True)
try:
    _engine.Ledger.create(arena)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    with Program("-c", script) as program:
        assert program.line() == "filling"
        wait_until(lambda: resident(program.process.pid) > 100 * MIB, "the ledger to fill its memory")
        program.process.send_signal(signal.SIGINT)
        assert program.line() == "interrupted"
        assert program.wait() == 0


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * PAGE


def test_program_exits_with_threads_running() -> None:
    script = """
from pageferry import _engine
from pageferry.workloads.arena.arena import Arena
ledger = _engine.Ledger.create(Arena(1 << 20), threads=2)
ledger.start()
print("started", flush=True)
"""
    with Program("-c", script, stderr=sys.stderr) as program:
        assert program.line() == "started"
        assert program.wait() == 0
