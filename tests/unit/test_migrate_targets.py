"""Tests of the migration benchmark: choice of the lines of its table to measure again, and targets."""

from __future__ import annotations

from typing import Any

from benchmarks.migrate import side_by_side, targets


def run(line: str, method: str, total: float, pause: float, **more: Any) -> dict[str, Any]:
    figures = {"total-ms": total, "stop-to-resume-ms": pause, "elapsed-ms": total + 100, "own-cpu-s": total / 1e3}
    return {"line": line, "method": method, "alive": True, "chosen": False, "accel": "tcg", "load": "busy"} | (
        figures | {"large-source": 3, "large-destination": 3} | more
    )


def guests(ours: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        run("QEMU 7.2", "precopy", 900, 20),
        run("QEMU 7.2", "multifd", 400, 40),
        run("QEMU 7.2", "multifd, qemu.qmp", 420, 40),
        run("QEMU 11.1", "multifd", 300, 60, alive=False),
        run("QEMU 11.1", "precopy", 500, 30),
        run("pageferry 7.2", "pageferry", *ours),
    ]


def judged(ours: tuple[float, float]) -> dict[str, bool]:
    results = {
        "guests": guests(ours),
        "throughput": [{"ratio": 0.8}],
        "ledger": [{"populate": "all", "large-pages-option": "keep", "faults-first-second": 2}],
    }
    return {target.what.split(" (")[0]: target.reached for target in targets.judge(results)}


def test_fastest_and_shortest_lines_are_repeated() -> None:
    assert side_by_side.chosen(guests((300, 10))) == [0, 1, 2, 5]


def test_line_that_is_fastest_and_shortest_is_repeated_with_the_next_one() -> None:
    runs = [run("a", "precopy", 900, 30), run("b", "multifd", 400, 20), run("c", "precopy", 500, 25)]
    assert side_by_side.chosen(runs) == [1, 2]


def test_faster_migration_with_a_shorter_pause_reaches_all_targets() -> None:
    assert all(judged((390, 30)).values())


def test_pause_longer_than_the_shortest_misses_one_target() -> None:
    missed = {what for what, reached in judged((390, 35)).items() if not reached}
    assert missed == {"STOP to RESUME, relative to the shortest"}


def test_slower_migration_with_a_longer_pause_is_worse_than_a_line() -> None:
    assert not judged((410, 45))["lines of QEMU with both a shorter total and a shorter pause"]


def test_lines_without_repetitions_do_not_count_if_others_have_some() -> None:
    runs = [*guests((300, 10)), run("QEMU 10.0", "multifd", 450, 50, chosen=True)]
    assert [group.name for group in targets.groups(runs, *targets.PEERS)] == ["QEMU 10.0, multifd"]
