"""Tests of migrations over long, slow and lossy links: they take longer, but do not time out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import Program
from tests.network import hosts
from tests.network.hosts import GIGABIT, Network


@pytest.fixture(autouse=True)
def _possible() -> None:
    hosts.require()


def moved(network: Network, *options: str, **setup: Any) -> list[dict[str, Any]]:
    """Migrate a ledger between the two hosts of a network. Return the events of the migration, its result last."""
    here, there = network.hosts
    with moving.ledger("ledger", here, **setup) as ledger, moving.receiver("ledger", *options[:2], host=there) as peer:
        with moving.migrating("ledger", moving.address_of(peer), *options, host=here) as migration:
            said = list(until_moved(migration))
            assert migration.wait() == 0
        moving.ends_intact(ledger, "moved")
        moving.runs("ledger", there)
        peer.process.terminate()
        assert moving.until(peer, "ledger")["intact"]
    return said


def until_moved(migration: Program) -> Iterator[dict[str, Any]]:
    kind = None
    while kind != "migration":
        said = migration.json()
        yield said
        kind = said["type"]


@pytest.mark.parametrize("streams", ["1", "4"])
def test_migration_over_a_long_fast_link(tmp_path: Path, streams: str) -> None:
    """The link has 1 Gbit/s and a round-trip time of 50 ms.

    The reported downtime includes the round trips of the switch-over.
    """
    with Network(tmp_path) as network:
        network.order(delay=0.025, rate=GIGABIT)
        result = moved(network, "--timeout", "5", "--streams", streams, size=64 * MIB)[-1]
    # The last round, Ready and Running each take a round trip.
    assert result["downtime"] >= 150
    assert result["downtime-parts"]["last-pages"] >= 50


def test_migration_over_a_lossy_link(tmp_path: Path) -> None:
    """The link has 100 Mbit/s, a round-trip time of 20 ms, and 1 % packet loss."""
    with Network(tmp_path, segments=False) as network:
        network.order(delay=0.01, rate=GIGABIT / 10, loss=0.01)
        options = {"threads": 2, "rate": MIB}
        result = moved(network, "--timeout", "5", "--streams", "2", "--codec", "lz4", size=16 * MIB, options=options)[
            -1
        ]
    assert result["memory"] == 16 * MIB


def test_migration_over_a_link_that_drains_buffers_slower_than_the_timeout(tmp_path: Path) -> None:
    with Network(tmp_path) as network:
        network.order(rate=1 * MIB)
        options = {"threads": 2, "rate": MIB // 16}
        said = moved(network, "--timeout", "2", "--max-downtime", "2000", size=4 * MIB, options=options)
    # Data in socket buffers does not count as sent, so progress is reported throughout.
    assert len([event for event in said if event["type"] == "progress"]) > 10


def test_migration_over_a_slow_link_does_not_converge(tmp_path: Path) -> None:
    """The reported bandwidth is that of the link, not of a socket buffer."""
    with Network(tmp_path) as network:
        network.order(rate=GIGABIT / 10)
        here, there = network.hosts
        options = {"threads": 2, "rate": 32 * MIB, "working_set": 1.0}
        with moving.ledger("ledger", here, size=8 * MIB, options=options) as ledger:
            with (
                moving.receiver("ledger", host=there) as peer,
                open(tmp_path / "stderr", "w+", encoding="utf-8") as stderr,
                moving.migrating("ledger", moving.address_of(peer), host=here, stderr=stderr) as migration,
            ):
                assert migration.wait() == 24
                stderr.seek(0)
                words = stderr.read().split(" takes ")[1]
                assert 1 < int(words.split(" MiB/s")[0]) <= 12
                assert peer.wait() == 21
            moving.runs("ledger", here)
            moving.ends_intact(ledger)
