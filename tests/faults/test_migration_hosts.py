"""Tests of failures of processes and links during a migration between two hosts, at each fault point.

By default a selection is tested; `make faults` (FAULTS=all) tests all failures at all points. The effect of a failure
does not depend on the workload, so most tests use a ledger. Guests, whose processes outlive the commands, are tested in
tests/qemu/test_migrate_failures.py and by the soak.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pageferry.migration.options import Options
from tests.kernel import moving
from tests.kernel.programs import wait_until
from tests.network import hosts
from tests.network.hosts import Network
from tests.network.journeys import DEEDS, Journey, mend, nothing_left, points
from tests.network.travellers import GuestTraveller, LedgerTraveller, Traveller, ended, guest_parts

MODES = get_args(get_type_hints(Options)["mode"])
NOT_BEFORE = "state-sent ready recorded committed commit-sent answered promised commit-received decided resumed".split()
"""Fault points at which the destination is prepared or is about to be prepared."""
DECIDED = "answered commit-received decided resumed".split()
"""Fault points at which the destination has received Commit."""
FATAL = ("source-agent", "destination-agent", "cut", "silence")
"""Failures that end a migration, unless it is complete."""
SELECTION = [
    ("source-agent", "source.between-rounds"),
    ("source-agent", "source.committed"),
    ("destination-agent", "destination.in-round"),
    ("destination-agent", "destination.decided"),
    ("source-workload", "source.in-round"),
    ("source-workload", "source.ready"),
    ("cut", "source.in-round"),
    ("cut", "destination.commit-received"),
    ("silence", "source.paused"),
    ("silence", "source.commit-sent"),
    ("blip", "source.last-pages-sent"),
    ("delay", "source.set-up"),
    ("damaged-pages", "source.in-round"),
    ("damaged-words", "source.in-round"),
    ("damaged-answer", "destination.loaded"),
]
HYBRID = [
    ("source-agent", "source.between-rounds"),
    ("destination-agent", "destination.decided"),
    ("source-workload", "source.ready"),
    ("cut", "source.in-round"),
    ("silence", "source.commit-sent"),
    ("damaged-pages", "source.in-round"),
]
"""Selection in hybrid mode, which is pre-copy and then post-copy."""
INSTEAD = {"source.in-round": "source.missing-sent", "destination.in-round": "destination.pager-begun"}
"""Replacements for fault points of the selection in post-copy mode."""


def cases() -> list[tuple[str, str, str]]:
    """Return tuples of failure, fault point and mode: all with FAULTS=all, otherwise a selection."""
    if os.environ.get("FAULTS") == "all":
        return [(deed, point, mode) for mode in MODES for deed in DEEDS for point in points(mode)]
    chosen = [(*case, mode) for mode in MODES for case in (HYBRID if mode == "hybrid" else SELECTION)]
    chosen = [(deed, INSTEAD.get(point, point) if mode == "postcopy" else point, mode) for deed, point, mode in chosen]
    return [(deed, point, mode) for deed, point, mode in chosen if point in points(mode)]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    hosts.require()
    with Network(tmp_path_factory.mktemp("hosts")) as network:
        yield network


@pytest.fixture(autouse=True)
def _mended(network: Network) -> Iterator[None]:
    yield
    mend(network)


@pytest.mark.parametrize(("deed", "point", "mode"), cases())
def test_ledger_has_one_owner_after_each_failure(
    network: Network, tmp_path: Path, deed: str, point: str, mode: str
) -> None:
    here, there = network.hosts
    with ended(LedgerTraveller(here)) as ledger:
        before = moving.descriptors(ledger.pid)
        with Journey(network, ledger, there, tmp_path, "--mode", mode, fault=f"{point}=stop") as journey:
            reached = journey.hold_or_end()
            assert reached or mode == "hybrid", journey.said("migrate")
            DEEDS[deed](journey)
            journey.release()
            owner = journey.settle()
        says_what_to_do(journey)
        if owner == "none":
            # The only process that held the workload was killed.
            assert deed in ("source-workload", "destination-agent")
            assert deed == "source-workload" or point.split(".")[1] in NOT_BEFORE or not reached
        elif deed in FATAL and point.split(".")[1] not in NOT_BEFORE and reached:
            assert owner == "source"
        elif point.split(".")[1] in DECIDED and deed != "destination-agent":
            assert owner == "destination"
        for host in network.hosts:
            nothing_left(host, *([ledger.name] if owner != "none" and host is ledger.host else []))
        if owner == "source":
            wait_until(lambda: moving.descriptors(ledger.pid) == before, "the end of all connections")
        if owner != "none":
            ledger.verify()


WORDS = {
    13: ("exited during its migration to", "restart it"),
    21: ("the peer ended the migration: ", "is still running on this host and can be migrated again"),
    22: ("the peer ", "is still running on this host and can be migrated again"),
    23: ("the ", "is still running on this host and can be migrated again"),
    26: ("no reply from", "to learn the outcome, run: pageferry migrate ledger --recover"),
}
"""Texts of the error message, by exit code: the failure and the remedy."""


def says_what_to_do(journey: Journey) -> None:
    said = journey.said("migrate")
    for words in WORDS.get(journey.code, ()):
        assert words in said
    assert "Traceback" not in said + journey.said("receive") + journey.said("recover")
    assert "unexpected" not in said + journey.said("receive") + journey.said("recover")


@pytest.mark.parametrize(
    ("deed", "point"),
    [("cut", "source.paused"), ("silence", "destination.decided"), ("destination-agent", "destination.resumed")],
)
def test_guest_has_one_owner_after_each_failure(
    network: Network, guest: Traveller, tmp_path: Path, deed: str, point: str
) -> None:
    origin = guest.host
    target = next(host for host in network.hosts if host is not origin)
    with Journey(network, guest, target, tmp_path, "--max-downtime", "5000", fault=f"{point}=stop") as journey:
        journey.hold_or_end()
        DEEDS[deed](journey)
        journey.release()
        owner = journey.settle()
    assert owner == ("source" if point == "source.paused" else "destination")
    for host in network.hosts:
        nothing_left(host, *([guest.name] if host is guest.host else []))
    guest.verify()


@pytest.fixture(scope="module")
def guest(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traveller]:
    parts = guest_parts()
    if parts is None:
        pytest.skip("no QEMU, no guest kernel or no rustc (`make system`)")
    with ended(GuestTraveller(parts, tmp_path_factory.mktemp("guest"), network.hosts[0])) as guest:
        yield guest
