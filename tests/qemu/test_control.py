"""Tests of the verbs that control guests: pause, resume, shutdown."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pageferry
from pageferry.errors import ShutdownTimeout, UnsupportedError, WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from tests.guest import travel
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, travelling
from tests.kernel import moving
from tests.kernel.programs import DEADLINE, wait_until

pytestmark = [pytest.mark.usefixtures("root")]


@contextmanager
def bare(parts: GuestParts, folder: Path, *options: str) -> Iterator[Traveller]:
    """Yield a machine without a guest system: it does not react to the power button."""
    with travelling(parts, folder, *options, memory="64M", checker=None) as guest:
        yield guest


def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a pageferry command, and check its exit code."""
    command = [sys.executable, "-m", "pageferry", *words]
    done = subprocess.run(command, timeout=DEADLINE, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def status(guest: Traveller) -> str:
    return str(guest.qmp("query-status")["status"])


def test_paused_guest_stays_paused_until_it_is_resumed(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path) as guest:
        for already in ("", "already "):
            assert run("pause", guest.name).stdout == f"{guest.name}: {already}paused\n"
            assert status(guest) == "paused"
            assert travel.listed()[guest.name] == "paused"
        for already in ("", "already "):
            assert run("resume", guest.name).stdout == f"{guest.name}: {already}running\n"
            assert status(guest) == "running"


def test_results_of_all_guests_are_reported_and_the_first_error_is_raised(
    newest_parts: GuestParts, tmp_path: Path
) -> None:
    with bare(newest_parts, tmp_path) as guest:
        done = run("pause", "none", guest.name, "--output", "json", code=11)
        assert json.loads(done.stdout) == {
            "type": "run-state",
            "workload": guest.name,
            "status": "paused",
            "changed": True,
        }
        assert "no workload named none" in done.stderr
        assert pageferry.resume(guest.name).changed


def test_guest_of_another_program_is_paused_in_python(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest:
        assert pageferry.pause(guest.name).changed
        assert not pageferry.pause(guest.name).changed
        assert asyncio.run(pageferry.resume_async(guest.name)).status == "running"


def test_process_and_arena_are_refused(registry: Registry) -> None:
    with pytest.raises(UnsupportedError, match="is a process"):
        pageferry.pause(f"pid:{os.getpid()}")
    with pageferry.Arena(1 << 20, name="table"):
        for verb in (pageferry.pause, pageferry.resume, pageferry.shutdown):
            with pytest.raises(UnsupportedError, match="is an arena"):
                verb("table")


def test_resume_waits_for_the_client_that_has_the_monitor(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest:
        pageferry.pause(guest.name)

        async def resumed_when_released() -> None:
            monitor = await Monitor.open(travel.entry(guest.name).qmp_socket)
            resuming = asyncio.create_task(pageferry.resume_async(guest.name))
            done, _ = await asyncio.wait({resuming}, timeout=0.5)
            assert not done
            assert (await monitor.execute("query-status"))["status"] == "paused"
            await monitor.close()
            assert (await resuming).changed

        asyncio.run(resumed_when_released())


@pytest.mark.parametrize("state", ["postmigrate", "inmigrate"])
def test_guest_of_a_foreign_migration_is_not_resumed(parts: GuestParts, tmp_path: Path, state: str) -> None:
    with bare(parts, tmp_path) as guest:
        if state == "postmigrate":
            guest.qmp("migrate", uri="exec:cat >/dev/null")
            wait_until(lambda: status(guest) == state, "QEMU's own migration to complete")
            assert "may run on another host" in run("resume", guest.name, code=10).stderr
            assert "may run on another host" in run("pause", guest.name, code=10).stderr
            return
        with guest.receiver() as there:
            moving.address_of(there)
            for verb in ("pause", "resume"):
                assert "it waits for" in run(verb, guest.next_name, code=10).stderr
            there.process.terminate()
            there.wait()


def test_guest_that_was_committed_is_not_resumed(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest, guest.receiver() as there:
        with guest.migrating(moving.address_of(there), fault="source.committed=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        assert f"pageferry migrate {guest.name} --recover" in run("resume", guest.name, code=10).stderr
        assert status(guest) != "running"
        with moving.migrating(guest.name, "--recover") as recovery:
            assert recovery.wait() == 0
        there.wait()
        assert not pageferry.resume(guest.name).changed


def test_loaded_guest_is_not_resumed_while_its_guardian_waits_for_the_monitor(
    newest_parts: GuestParts, tmp_path: Path
) -> None:
    """The receiver is killed when the state is loaded, and the resuming client is in front of the guardian."""
    with bare(newest_parts, tmp_path) as guest, guest.receiver(fault="destination.loaded=stop") as there:
        with guest.migrating(moving.address_of(there), "--timeout", "5") as migration:
            moving.stopped(there)
            waiting = subprocess.Popen(
                [sys.executable, "-m", "pageferry", "resume", guest.next_name],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            socket = travel.entry(guest.next_name).qmp_socket
            wait_until(lambda: connections(socket) > 1, "the resuming command to wait for the monitor")
            there.kill()
            output, _ = waiting.communicate(timeout=DEADLINE)
            assert waiting.returncode in (10, 13), output
            assert "another host may own it" in output
            assert migration.wait() == 23
        assert status(guest) == "running"
        guest.alone()


def connections(path: str) -> int:
    """Return the number of connections to a Unix socket, accepted or waiting."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(1 for line in lines if line.endswith(f" {path}") and line.split()[3] == "00000000")


def test_received_guest_can_be_paused_and_resumed(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest:
        pageferry.pause(guest.name)
        guest.move()
        assert status(guest) == "paused"
        assert pageferry.resume(guest.name).changed
        guest.move()
        assert status(guest) == "running"
        assert pageferry.pause(guest.name).changed
        assert pageferry.resume(guest.name).changed


def test_guest_that_a_guardian_has_continued_can_be_paused_and_resumed(
    newest_parts: GuestParts, tmp_path: Path
) -> None:
    with bare(newest_parts, tmp_path) as guest, guest.receiver(fault="destination.decided=kill") as there:
        with guest.migrating(moving.address_of(there), "--timeout", "2") as migration:
            assert migration.wait() == 26
        there.wait()
        source = guest.name
        guest.journeys += 1
        wait_until(lambda: status(guest) == "running", "the guardian to continue the guest")
        assert "--recover" in run("resume", source, code=10).stderr
        guest.qmp("stop")  # not seen by pageferry
        assert pageferry.resume(guest.name).changed
        run("stop", "--kill", source)


def test_guest_without_an_operating_system_does_not_shut_down(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest:
        failed = run("shutdown", guest.name, "--timeout", "1.5", code=14)
        assert "has not shut down 1.5 s after" in failed.stderr
        assert "set --timeout" in failed.stderr
        assert status(guest) == "running"
        with pytest.raises(ShutdownTimeout):
            pageferry.shutdown(guest.name, timeout=0.5)
        forced = run("shutdown", guest.name, "--timeout", "500ms", "--force")
        assert forced.stdout.startswith(f"{guest.name}: stopped, because it did not shut down (")
        assert guest.name not in Registry().entries()


def test_paused_guest_is_not_shut_down(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest:
        pageferry.pause(guest.name)
        with pytest.raises(WorkloadError, match="cannot react to a shutdown: it is paused"):
            pageferry.shutdown(guest.name)
        assert pageferry.shutdown(guest.name, force=True).forced
