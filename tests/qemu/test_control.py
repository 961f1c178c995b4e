"""Tests of the verbs that control guests: pause, resume, shutdown, console, monitor, logs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pageferry
from pageferry.control.console import Console
from pageferry.errors import ShutdownTimeout, UnsupportedError, WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from tests.guest import boot_sector, travel
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, travelling
from tests.kernel import moving
from tests.kernel.programs import DEADLINE, Program, wait_until

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
    with pageferry.Arena(1 << 20, name="table", on_pause=threading.Lock()):
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
    """The receiver is killed when the state is loaded. The waiting command gets the monitor before the guardian."""
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
        assert "increase --timeout" in failed.stderr
        assert status(guest) == "running"
        with pytest.raises(ShutdownTimeout):
            pageferry.shutdown(guest.name, timeout=0.5)
        forced = run("shutdown", guest.name, "--timeout", "500ms", "--force")
        assert forced.stdout.startswith(f"{guest.name}: stopped after ")
        assert forced.stdout.endswith(", because it did not shut down\n")
        assert guest.name not in Registry().entries()


def test_paused_guest_is_not_shut_down(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest:
        pageferry.pause(guest.name)
        with pytest.raises(WorkloadError, match=r"cannot shut down .*: it is paused"):
            pageferry.shutdown(guest.name)
        assert pageferry.shutdown(guest.name, force=True).forced


# -- a guest that reacts: see tests/guest/boot_sector.py


@pytest.fixture
def binary(qemu_system: Path, guest_kernel: Path) -> GuestParts:
    """Return the parts of a guest whose QEMU is a binary: pageferry adds no console if the program is a script."""
    return GuestParts(qemu_system, guest_kernel)


def machine(parts: GuestParts, folder: Path) -> list[str]:
    words = [str(parts.qemu), "-accel", parts.accel, "-display", "none", "-nic", "none", "-m", "64M"]
    return [*words, *boot_sector.options(folder)]


def own_console(folder: Path) -> list[str]:
    """Return the options of a console that the user has added, with its output in `own.log`."""
    device = f"socket,id=own,path={folder}/own.sock,server=on,wait=off,logfile={folder}/own.log"
    return ["-chardev", device, "-serial", "chardev:own"]


@contextmanager
def reacting(parts: GuestParts, folder: Path, *more: str) -> Iterator[str]:
    """Start a detached guest that reacts to the power button. Yield its name, and kill the guest after the block."""
    name = "reacting"
    run("run", name, "--detach", "--", *machine(parts, folder), *more)
    try:
        yield name
    finally:
        if name in Registry().entries():
            run("stop", "--kill", name)


def until(output: Callable[[], bytes], expected: bytes) -> None:
    wait_until(lambda: expected in output(), f"{expected!r} in the output")


def booted(name: str) -> None:
    """Wait until the guest, which has a console, has booted."""
    with pageferry.console(name) as console:
        wait_until(lambda: echoed(console), "the echo of the guest")


@pytest.mark.every_qemu
def test_guest_shuts_down(parts: GuestParts, tmp_path: Path) -> None:
    with reacting(parts, tmp_path, *own_console(tmp_path)) as name:
        until((tmp_path / "own.log").read_bytes, boot_sector.PROMPT)
        assert run("shutdown", name).stdout.startswith(f"{name}: shut down after ")
        assert name not in Registry().entries()
        listed = [json.loads(line) for line in run("list", "--all", "--output", "json").stdout.splitlines()]
        (ended,) = (one for one in listed if one["name"] == name)
        assert (ended["type"], ended["cause"], ended["exact"]) == ("ended-workload", "exited", True)


def test_guest_without_shutdown_of_qemu_is_ended(binary: GuestParts, tmp_path: Path) -> None:
    with reacting(binary, tmp_path, "-no-shutdown") as name:
        booted(name)
        assert not pageferry.shutdown(name).forced
        assert name not in Registry().entries()


def used_once(guest: Traveller) -> None:
    """Wait until a command has used the monitor of a guest. A shutdown uses the monitor every second."""
    socket_path = travel.entry(guest.name).qmp_socket
    wait_until(lambda: connections(socket_path), "the command to use the monitor")
    wait_until(lambda: not connections(socket_path), "the monitor to be free")


def test_other_commands_use_a_guest_that_is_shutting_down(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest, Program("-m", "pageferry", "shutdown", guest.name) as shutdown:
        used_once(guest)
        assert travel.listed()[guest.name] == "running"
        run("stop", guest.name)
        assert shutdown.wait() == 0


def test_guest_that_is_migrated_during_its_shutdown_is_not_reported_as_shut_down(
    newest_parts: GuestParts, tmp_path: Path
) -> None:
    with bare(newest_parts, tmp_path) as guest, guest.receiver() as there:
        command = [sys.executable, "-m", "pageferry", "shutdown", guest.name]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as shutdown:
            used_once(guest)
            with guest.migrating(moving.address_of(there)) as migration:
                assert migration.wait() == 0
            assert there.wait() == 0
            _, output = shutdown.communicate(timeout=DEADLINE)
        assert shutdown.returncode == 10, output
        assert "may run at the destination" in output
        source = guest.name
        guest.arrived()
        assert f"{source}: migrated to another host at " in " ".join(run("list", "--all").stdout.split())


# -- console


@contextmanager
def terminal(*words: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a pageferry command on a pseudo-terminal. Yield the process and the terminal."""
    outer, inner = pty.openpty()
    before = termios.tcgetattr(inner)
    command = [sys.executable, "-m", "pageferry", *words]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True) as child:
        try:
            yield child, outer
            assert termios.tcgetattr(inner) == before
        finally:
            child.kill()
    os.close(outer)
    os.close(inner)


def read_until(descriptor: int, expected: bytes) -> bytes:
    found = b""
    while expected not in found:
        ready, _, _ = select.select([descriptor], [], [], DEADLINE)
        assert ready, found
        found += os.read(descriptor, 1 << 16)
    return found


@pytest.mark.every_qemu
def test_console_of_a_guest_is_attached_and_detached(parts: GuestParts, tmp_path: Path) -> None:
    with reacting(parts, tmp_path, *own_console(tmp_path)) as name:
        until((tmp_path / "own.log").read_bytes, boot_sector.PROMPT)
        for _ in range(2):
            with terminal("console", name) as (child, outer):
                read_until(outer, b"Ctrl-] detaches")
                os.write(outer, b"a")
                assert b"b" in read_until(outer, b"b")
                refused = run("console", name, code=10)
                assert f"process {child.pid} has opened it" in refused.stderr
                os.write(outer, b"\x1d")
                read_until(outer, b"detached")
                assert child.wait(DEADLINE) == 0
        assert travel.listed()[name] == "running"
        assert (tmp_path / "own.log").read_bytes() == b">bb"


def test_console_of_another_client_is_not_opened(binary: GuestParts, tmp_path: Path) -> None:
    with reacting(binary, tmp_path) as name:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(Registry().path / name / "tty.sock"))
            wait_until(
                lambda: "disconnected" not in str(pageferry.qmp(name, "query-chardev")), "QEMU to accept the client"
            )
            with pytest.raises(WorkloadError, match="another client has opened"):
                pageferry.console(name)
        wait_until(lambda: "disconnected" in str(pageferry.qmp(name, "query-chardev")), "the end of the client")
        with pageferry.console(name) as console:
            console.write(b"ab")
            assert console.read(1) + console.read(1) == b"bc"


def test_console_ends_with_the_guest(binary: GuestParts, tmp_path: Path) -> None:
    with reacting(binary, tmp_path) as name, terminal("console", name) as (child, outer):
        read_until(outer, b"Ctrl-] detaches")
        run("stop", name)
        read_until(outer, b"the guest has closed its console")
        assert child.wait(DEADLINE) == 0


@pytest.mark.parametrize("serial", ["pty", "unix:{}/own.sock,server=on,wait=off"])
def test_console_of_the_users_serial_option_is_opened(binary: GuestParts, tmp_path: Path, serial: str) -> None:
    with reacting(binary, tmp_path, "-serial", serial.format(tmp_path)) as name:
        booted(name)


def echoed(console: Console) -> bool:
    """Send a byte, which a guest that is still booting does not echo. Return whether the guest has replied."""
    console.write(b"a")
    ready, _, _ = select.select([console], [], [], 0.5)
    return bool(ready) and b"b" in console.read()


def test_restored_guest_has_a_console(binary: GuestParts, tmp_path: Path) -> None:
    with reacting(binary, tmp_path) as name:
        booted(name)
        run("checkpoint", name, str(tmp_path / "image"))
        run("stop", name)
        # Neither guest has written to its temporary overlay of the disk.
        words = ["restore", name, str(tmp_path / "image"), "--detach", "--disks", "as-is"]
        run(*words, "--", *machine(binary, tmp_path))
        with pageferry.console(name) as console:
            console.write(b"x")
            assert console.read(1) == b"y"


def test_guest_with_an_added_console_is_received_without_one(binary: GuestParts, tmp_path: Path) -> None:
    """The console does not change the machine: a receiver in the foreground adds none."""
    words = ["receive", "received", "--output", "json", "--", *machine(binary, tmp_path)]
    with reacting(binary, tmp_path) as name, Program("-m", "pageferry", *words) as receiver:
        booted(name)
        run("migrate", name, moving.address_of(receiver), "--disks", "shared")
        assert pageferry.qmp("received", "query-status")["status"] == "running"
        assert "the serial port is not connected" in run("console", "received", code=3).stderr
        run("stop", "received")
        assert receiver.wait() == 0


def test_script_that_starts_qemu_gets_no_console(binary: GuestParts, tmp_path: Path) -> None:
    script = tmp_path / "qemu-system-x86_64"
    script.write_text(f'#!/bin/sh\nexec {binary.qemu} "$@" -nodefaults\n')
    script.chmod(0o755)
    with reacting(dataclasses.replace(binary, qemu=script), tmp_path) as name:
        assert "the serial port is not connected" in run("console", name, code=3).stderr


def test_guest_without_a_serial_port_has_no_console(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest:
        assert "the serial port is not connected" in run("console", guest.name, code=3).stderr


# -- monitor


def test_monitor_executes_commands(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path) as guest:
        assert "VM status: running" in run("monitor", guest.name, "info", "status").stdout
        reply = json.loads(run("monitor", guest.name, "--qmp", "query-status", "--output", "json").stdout)
        assert (reply["type"], reply["command"], reply["result"]["status"]) == (
            "monitor-reply",
            "query-status",
            "running",
        )
        script = '{"execute": "stop"}\nquery-status\n\nno-such-command\ncont\n'
        done = subprocess.run(
            [sys.executable, "-m", "pageferry", "monitor", guest.name, "--qmp"],
            input=script,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 10
        assert [json.loads(line) for line in done.stdout.splitlines()][1]["status"] == "paused"
        assert "no-such-command" in done.stderr
        assert pageferry.monitor(guest.name, "info status").strip() == "VM status: paused"
        run("monitor", guest.name, "quit")
        wait_until(lambda: guest.name not in Registry().entries(), "the exit of QEMU")


def test_monitor_on_a_terminal_is_a_shell(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest, terminal("monitor", guest.name) as (child, outer):
        read_until(outer, f"({guest.name}) ".encode())
        os.write(outer, b"info status\r")
        read_until(outer, b"VM status: running")
        assert travel.listed()[guest.name] == "running"  # the monitor is free in between
        os.write(outer, b"\x04")
        assert child.wait(DEADLINE) == 0
        read_until(outer, b"\n")


def test_monitor_does_not_continue_a_guest_that_was_committed(newest_parts: GuestParts, tmp_path: Path) -> None:
    with bare(newest_parts, tmp_path) as guest, guest.receiver() as there:
        with guest.migrating(moving.address_of(there), fault="source.committed=kill") as migration:
            assert migration.wait() == -signal.SIGKILL
        for words in (["cont"], ["c"], ["--qmp", "cont"]):
            assert "--recover" in run("monitor", guest.name, *words, code=10).stderr
        with moving.migrating(guest.name, "--recover") as recovery:
            assert recovery.wait() == 0
        there.wait()


# -- logs


def test_log_of_a_crashed_guest_is_kept(newest_parts: GuestParts, tmp_path: Path) -> None:
    with reacting(newest_parts, tmp_path, "-d", "guest_errors", "-msg", "timestamp=on") as name:
        with Program("-m", "pageferry", "logs", name, "--follow") as following:
            os.kill(travel.entry(name).pid, signal.SIGTERM)
            while "terminating on signal 15" not in following.line():
                pass
            assert following.wait() == 0
        assert name not in travel.listed()
        assert "terminating on signal 15" in run("logs", name).stdout
        assert "terminating on signal 15" in " ".join(run("list", "--all").stdout.split())
        run("logs", name, "--remove")
        assert name not in run("list", "--all").stdout


def test_end_of_a_guest_in_the_foreground_is_recorded(newest_parts: GuestParts) -> None:
    name = "foreground"
    with Program("-m", "pageferry", "run", name, "--", *newest_parts.bare("-m", "64M")) as program:
        wait_until(lambda: name in travel.listed(), "the guest to run")
        os.kill(travel.entry(name).pid, signal.SIGKILL)
        assert program.wait() == 10
    assert f"{name}: killed by SIGKILL at " in " ".join(run("list", "--all").stdout.split())
    assert "the guest wrote to a terminal" in run("logs", name, code=3).stderr
