"""Migrations of arenas by command and from Python, while threads write to the arenas."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pageferry.host.registry import Registry
from tests.conftest import FULL
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import Program

HERE = Path(__file__).parent

RUNS = list(
    itertools.islice(
        zip(
            itertools.cycle(["none", "lz4", "zstd"]),
            itertools.cycle([1, 2, 4, 1]),
            itertools.cycle(["all", "hot", "none", "all", "hot"]),
            itertools.cycle(["4K", "2M", "auto", "auto", "4K", "2M", "auto"]),
            itertools.cycle(["keep", "keep", "keep", "ignore"]),
            strict=False,
        ),
        20,
    )
)
"""Arguments of `options` for 20 migrations. The first 7 contain every value. The cycles have different
lengths, to combine the values in many ways."""

pytestmark = pytest.mark.usefixtures("root")


def options(codec: str, streams: int, populate: str, granularity: str, large: str) -> list[str]:
    return [
        *("--codec", codec, "--streams", str(streams), "--populate", populate),
        *("--trace-granularity", granularity, "--large-pages", large),
    ]


def check_counts(result: dict[str, Any], large: str) -> None:
    assert (result["type"], result["status"], result["mode"]) == ("migration", "completed", "precopy")
    # Every page is counted at least once, in one of three classes.
    assert result["normal"] + result["duplicate"] + result["skipped"] >= result["memory"] // 4096
    counts = result["large-pages"]
    if large == "keep":
        assert counts["destination"] + counts["fallbacks"] >= counts["source"]
    parts = result["downtime-parts"]
    assert 0 < parts["stop"] <= result["downtime"] == parts["total"] < result["total-time"]


@pytest.mark.parametrize(
    ("moves", "setup"),
    [
        (
            20 if FULL else 7,
            {"large_fraction": 0.5, "options": {"threads": 2, "rate": 40 * MIB, "zero_fraction": 0.3, "skew": 2.0}},
        ),
        (
            2,
            {
                "processes": 3,
                "options": {"threads": 3, "rate": 40 * MIB, "zero_fraction": 0.5, "fill": 0.8, "compressible": 0.5},
            },
        ),
    ],
    ids=["mixed-page-sizes", "three-source-processes"],
)
def test_moves_under_write_load_lose_no_write(moves: int, setup: dict[str, Any]) -> None:
    with ExitStack() as programs:
        here, writes = programs.enter_context(moving.ledger("move-0", size=64 * MIB, **setup)), 0
        for number, chosen in enumerate(RUNS[:moves], 1):
            there = programs.enter_context(moving.receiver(f"move-{number}"))
            address = moving.address_of(there)
            with moving.migrating(f"move-{number - 1}", address, *options(*chosen)) as migration:
                check_counts(moving.until(migration, "migration"), chosen[-1])
                assert migration.wait() == 0
            received = {"type": "received", "workload": f"move-{number}", "kind": "arena", "paused": False}
            assert there.json().items() >= received.items()
            end = moving.until(here, "ledger")
            assert end["intact"], end
            assert end["writes"] > writes
            assert here.wait() == 0
            moving.runs(f"move-{number}")
            here, writes = there, end["writes"]
        here.process.terminate()
        end = moving.until(here, "ledger")
        assert (end["intact"], end["writes"] > writes) == (True, True)


def test_bandwidth_limit_is_kept() -> None:
    """The limit applies to all streams together, in bytes per second."""
    with (
        moving.ledger("limited", size=32 * MIB, options={"threads": 1, "rate": MIB}) as here,
        moving.receiver("slow") as there,
    ):
        chosen = ["--bandwidth", "16M", "--streams", "3", "--codec", "lz4", "--adaptive"]
        with moving.migrating("limited", moving.address_of(there), *chosen) as migration:
            result = moving.until(migration, "migration")
            assert migration.wait() == 0
        # The last three blocks of 512 KiB, one per stream, may exceed the limit.
        assert result["total-time"] / 1000 >= (result["transferred"] - 3 * MIB / 2) / (16 * MIB) - 0.05
        assert moving.until(here, "ledger")["intact"]


# -- migrations from Python


def source(size: int, *how: str) -> Program:
    """Start a program with an arena. `how`: words that the docstring of `arena_mover` lists."""
    return Program(str(HERE / "arena_mover.py"), "source", str(size), *how)


def destination(*how: str, fault: str | None = None) -> Program:
    return Program(str(HERE / "arena_mover.py"), "destination", *how, env=moving.environment(fault))


def move(here: Program, there: Program) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Migrate an arena between two programs. Return the result, and the reports of source and destination."""
    here.say(f"migrate {there.json()['address']}")
    return here.json(), here.json(), there.json()


@pytest.mark.parametrize("size", [4096, 5 * MIB + 12288, 16 * MIB])
@pytest.mark.parametrize("how", [("writing",), ("writing", "stateful", "collapsed"), ("memfd", "writing")])
def test_program_moves_its_own_arena(size: int, how: tuple[str, ...]) -> None:
    with source(size, *how) as here, destination("stateful" if "stateful" in how else "stateless") as there:
        result, had, has = move(here, there)
        assert result["status"] == "completed"
        assert had == {"size": size, "calls": ["paused", "moved"], "digest": has["digest"], "state": has["state"]}
        assert has["size"] == size
        assert has["calls"] == (["loaded", "resumed"] if "stateful" in how else ["resumed"])
        there.say("write")
        assert there.json() == {"written": True}


def test_untouched_arena_moves_and_stays_empty() -> None:
    with source(64 * MIB) as here, destination("stateless") as there:
        result, _, has = move(here, there)
        assert (result["normal"], result["duplicate"], result["skipped"]) == (0, 0, 64 * MIB // 4096)
        assert (has["allocated"], has["calls"]) == (0, ["resumed"])


def test_sparse_arena_is_not_allocated_at_the_destination() -> None:
    with source(4 << 30, "sparse") as here, destination("stateless") as there:
        result, had, has = move(here, there)
        assert had["digest"] == has["digest"]
        assert result["normal"] == 3
        assert 0 < has["allocated"] <= 4 * 2 * MIB


def test_oversized_arena_is_refused_and_the_next_is_received() -> None:
    with destination("stateless", "small") as there:
        address = there.json()["address"]
        with source(32 * MIB, "writing") as large:
            large.say(f"migrate {address}")
            assert "accepts at most 16 MiB" in large.json()["PeerRefused"]
            large.say("calls")
            assert large.json() == []
        with source(8 * MIB, "writing") as small:
            small.say(f"migrate {address}")
            assert small.json()["status"] == "completed"
            assert small.json()["digest"] == there.json()["digest"]


def test_named_arena_is_moved_by_the_command() -> None:
    with source(8 * MIB, "writing", "stateful", "named") as here, destination("stateful") as there:
        with moving.migrating("mover", there.json()["address"], "--codec", "lz4") as migration:
            assert moving.until(migration, "migration")["workload"] == "mover"
            assert migration.wait() == 0
        here.say("had")
        had, has = here.json(), there.json()
        assert (had["digest"], had["state"]) == (has["digest"], has["state"])
        assert had["calls"] == ["paused", "moved"]
        assert "mover" not in Registry().entries()


def test_failed_migrations_leave_no_descriptors_open() -> None:
    with source(8 * MIB, "writing") as here:
        here.say("descriptors")
        before = here.json()
        for _ in range(3):
            with destination("stateless", fault="destination.in-round=kill") as there:
                here.say(f"migrate {there.json()['address']}")
                assert "ConnectionLost" in here.json()
        here.say("descriptors")
        assert here.json() == before
        assert moving.traces(here.process.pid) == 0


@pytest.mark.parametrize(("point", "calls"), [("in-round", []), ("state-received", ["paused", "resumed"])])
def test_program_may_cancel_a_migration(point: str, calls: list[str]) -> None:
    with (
        source(8 * MIB, "writing") as here,
        destination("stateless", fault=f"destination.{point}=stop") as there,
    ):
        here.say("descriptors")
        before = here.json()
        here.say(f"briefly {there.json()['address']}")
        moving.stopped(there)
        here.say("enough")
        assert here.json() == "gave up"
        assert here.json() == calls
        here.say("descriptors")
        assert here.json() == before
        assert moving.traces(here.process.pid) == 0
