"""Tests of post-copy and hybrid migrations of Linux guests: interrupted, recovered, saved, and migrated again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.images.image import ImageFile
from tests.guest import travel
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, travelling
from tests.kernel import moving
from tests.kernel.programs import DEADLINE, Program, wait_until

pytestmark = pytest.mark.usefixtures("root")

SLOWLY = ("--mode", "postcopy", "--bandwidth", "16M")
"""Options of a migration that takes several seconds because of its bandwidth limit."""


@pytest.fixture(scope="module")
def guest(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traveller]:
    with travelling(parts, tmp_path_factory.mktemp("guest")) as traveller:
        yield traveller


def stall_reason(name: str) -> str | None:
    """Return the stall reason that `pageferry list` reports for a workload; None if it reports none."""
    command = [sys.executable, "-m", "pageferry", "list", "--output", "json"]
    said = subprocess.run(command, check=True, timeout=DEADLINE, capture_output=True, text=True).stdout
    found = next(one for one in map(json.loads, said.splitlines()) if one["name"] == name)
    return str(found["stall-reason"]) if found["stall-reason"] is not None else None


@pytest.mark.oldest_qemu
@pytest.mark.parametrize(
    "options",
    ["--mode postcopy", "--mode postcopy --codec lz4 --streams 2", "--mode hybrid --max-downtime 0 --max-rounds 1"],
)
def test_guest_is_migrated_by_postcopy_and_hybrid(guest: Traveller, options: str) -> None:
    before = guest.runs()
    result = guest.move(*options.split())
    after = guest.verifies_everything()
    assert after.writes > before.writes
    assert result["mode"] in options
    assert result["postcopy"]["pages"] > 0
    if result["mode"] == "postcopy":  # in hybrid mode, all pages may be received before any access
        assert result["postcopy-requests"] > 0
    large = result["large-pages"]
    assert large["destination"] == large["source"] > 16
    guest.untouched()


def lost(guest: Traveller, there: Program) -> None:
    """Start a post-copy migration, and close its connections as soon as the guest runs at the destination."""
    fault = "source.answered=drop"
    with guest.migrating(moving.address_of(there), "--mode", "postcopy", fault=fault) as migration:
        assert migration.wait() == 28
    moving.until(there, "received")


def recovers(guest: Traveller) -> None:
    with moving.migrating(guest.name, "--recover") as recovery:
        assert moving.until(recovery, "recovery")["owner"] == "destination"
        assert recovery.wait() == 0
    guest.arrived()
    guest.verifies_everything()
    guest.untouched()


def test_guest_waits_for_a_lost_link_and_continues_after_recovery(guest: Traveller) -> None:
    guest.runs()
    with guest.receiver() as there:
        lost(guest, there)
        wait_until(lambda: "link" in (stall_reason(guest.next_name) or ""), "the stall reason")
        recovers(guest)
        assert there.wait() == 0


def test_second_receiver_continues_for_a_killed_one(guest: Traveller) -> None:
    """Missing pages stay missing: QEMU keeps the userfaultfd open, and the deferred bitmap is in a file."""
    guest.runs()
    with guest.receiver() as there:
        address = moving.address_of(there)
        fault = "source.answered=drop"
        with guest.migrating(address, "--mode", "postcopy", fault=fault) as migration:
            assert migration.wait() == 28
        moving.until(there, "received")
        there.process.send_signal(signal.SIGKILL)
        assert there.wait() == -signal.SIGKILL
    assert "--resume" in str(stall_reason(guest.next_name))
    with moving.migrating(guest.name, "--recover") as recovery:
        assert recovery.wait() == 26  # no receiver listens
    resuming = ("-m", "pageferry", "receive", guest.next_name, "--resume", "--output", "json", "--listen", address)
    with Program(*resuming) as there:
        moving.address_of(there)
        recovers(guest)
        assert moving.until(there, "resumed")["workload"] == guest.name
        assert there.wait() == 0
    assert travel.listed() == {guest.name: "running"}
    with Program(*resuming[:3], guest.name, "--resume") as nothing:
        assert nothing.wait() == 2


@pytest.mark.oldest_qemu
def test_checkpoint_during_postcopy_waits_for_all_pages(guest: Traveller, tmp_path: Path) -> None:
    guest.runs()
    with guest.receiver() as there, guest.migrating(moving.address_of(there), *SLOWLY) as migration:
        moving.until(there, "received")
        with Program("-m", "pageferry", "checkpoint", guest.next_name, str(tmp_path / "image")) as saver:
            assert migration.process.poll() is None, "the migration completed before the checkpoint began"
            assert saver.wait() == 0
        assert migration.wait() == 0
        assert there.wait() == 0
    guest.arrived()
    guest.verifies_everything()
    assert ImageFile(tmp_path / "image").verify() == []


def test_guest_is_migrated_again_during_postcopy(guest: Traveller) -> None:
    guest.runs()
    with guest.receiver() as there, guest.migrating(moving.address_of(there), *SLOWLY) as migration:
        moving.until(there, "received")
        guest.journeys += 1
        with guest.receiver() as further, guest.migrating(moving.address_of(further)) as onward:
            assert migration.process.poll() is None, "the first migration completed before the second began"
            assert onward.wait() == 0
            assert further.wait() == 0
        assert migration.wait() == 0
        assert there.wait() == 0
    guest.arrived()
    guest.verifies_everything()
