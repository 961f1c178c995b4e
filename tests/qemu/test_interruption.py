"""Tests that commands that wait for an unresponsive process exit within a second of SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pageferry
from pageferry.host.blocking import interruptible
from pageferry.host.registry import QemuEntry, Registry
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts
from tests.kernel.programs import Program, wait_until

CATCHES_SIGTERM = 1 << signal.SIGTERM - 1


def limit() -> float:
    """Return the maximum time between the signal and the exit, seconds: 1, plus half of the load average per CPU."""
    return 1.0 + 0.5 * os.getloadavg()[0] / (os.cpu_count() or 1)


OWNER = """
import sys, threading, pageferry
arena = pageferry.Arena(1 << 20, "hanging", on_pause=threading.Event().wait)
print("ready", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def hanging(tmp_path: Path) -> str:
    """Create a program that accepts QEMU's options but never opens a monitor. Return the path of the program."""
    program = tmp_path / "qemu-that-hangs"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def guest(newest_parts: GuestParts, registry: Registry) -> Iterator[int]:
    """Yield the pid of a guest's QEMU process that does not respond, because SIGSTOP has stopped it."""
    workload = asyncio.run(QemuWorkload.start("still", newest_parts.bare("-m", "64M")))
    os.kill(workload.pid, signal.SIGSTOP)
    try:
        yield workload.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(workload.pid, signal.SIGKILL)
        workload.close()
        registry.remove("still")


@pytest.fixture(scope="module")
def image(newest_parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an image of a machine without a boot device. Return the path of the image."""

    async def make() -> Path:
        path = tmp_path_factory.mktemp("image") / "image"
        workload = await QemuWorkload.start("imaged", newest_parts.bare("-m", "64M"))
        await pageferry.checkpoint_async(workload, path)
        await workload.discard()
        return path

    return asyncio.run(make())


def ends(command: Program, number: signal.Signals) -> None:
    """Check that the command waits, and that it exits within `limit()` after the signal `number`."""
    wait_until(lambda: caught(command.process.pid) & CATCHES_SIGTERM, "the signal handler")
    time.sleep(2)
    assert command.process.poll() is None
    before = time.monotonic()
    command.process.send_signal(number)
    assert command.process.wait(30) == 128 + number
    assert time.monotonic() - before < limit()


def caught(pid: int) -> int:
    """Return the mask of the signals that a process handles."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("SigCgt:")), 16)


def cli(*words: str) -> Program:
    return Program("-m", "pageferry", *words)


SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", ["run", "receive"])
def test_start_of_an_unresponsive_guest_is_interrupted(verb: str, number: signal.Signals, hanging: str) -> None:
    with cli(verb, "unborn", "--", hanging, "-m", "64M") as command:
        ends(command, number)
    assert "unborn" not in Registry().entries()


@pytest.mark.parametrize("number", SIGNALS)
def test_restore_into_an_unresponsive_guest_is_interrupted(image: Path, number: signal.Signals, hanging: str) -> None:
    with cli("restore", "unborn", str(image), "--", hanging, "-m", "64M") as command:
        ends(command, number)
    assert "unborn" not in Registry().entries()


def test_restore_with_an_unresponsive_pager_is_interrupted_and_its_guest_ends(
    image: Path, newest_parts: GuestParts
) -> None:
    environment = os.environ | {"PAGEFERRY_FAULT": "pager.opened=stop"}
    command = ["-m", "pageferry", "restore", "unserved", str(image), "--", *newest_parts.bare("-m", "64M")]
    with Program(*command, env=environment) as restore:
        ends(restore, signal.SIGTERM)
    assert "unserved" not in Registry().entries()


@pytest.mark.parametrize("words", [["checkpoint", "still", "IMAGE"], ["migrate", "still", "127.0.0.1:1"]])
def test_operation_on_an_unresponsive_guest_is_interrupted(words: list[str], guest: int, tmp_path: Path) -> None:
    with cli(*[str(tmp_path / "image") if word == "IMAGE" else word for word in words]) as command:
        ends(command, signal.SIGTERM)


@pytest.mark.parametrize("verb", ["run", "receive"])
def test_unresponsive_foreground_guest_is_killed_at_interruption(verb: str, newest_parts: GuestParts) -> None:
    with cli(verb, "stuck", "--", *newest_parts.bare("-m", "64M")) as command:
        wait_until(lambda: isinstance(Registry().entries().get("stuck"), QemuEntry), "the guest to be registered")
        entry = Registry().lookup("stuck")
        time.sleep(1)
        os.kill(entry.pid, signal.SIGSTOP)
        ends(command, signal.SIGTERM)
    assert "stuck" not in Registry().entries()


def test_migration_to_a_silent_destination_is_interrupted(newest_parts: GuestParts, registry: Registry) -> None:
    workload = asyncio.run(QemuWorkload.start("silent", newest_parts.bare("-m", "64M")))
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            with cli("migrate", "silent", address) as command:
                ends(command, signal.SIGTERM)
    finally:
        asyncio.run(workload.discard())


@pytest.mark.parametrize("words", [["checkpoint", "hanging", "IMAGE"], ["migrate", "hanging", "ADDRESS"]])
def test_operation_with_a_blocked_callback_is_interrupted(words: list[str], tmp_path: Path) -> None:
    listening = "listening=lambda address: print(address, flush=True)"
    receiver = f"import pageferry; pageferry.receive('127.0.0.1:0', {listening})"
    with Program("-c", OWNER) as owner, Program("-c", receiver) as there:
        assert owner.line() == "ready"
        known = {"IMAGE": str(tmp_path / "image"), "ADDRESS": there.line()}
        with cli(*[known.get(word, word) for word in words]) as command:
            ends(command, signal.SIGTERM)


def test_stop_of_an_unresponsive_guest_recommends_kill(guest: int) -> None:
    command = [sys.executable, "-m", "pageferry", "stop", "still"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 10
    assert "pageferry stop --kill still" in done.stderr
    assert subprocess.run([*command, "--kill"], timeout=60).returncode == 0


def test_blocking_python_call_is_interrupted() -> None:
    """The main thread waits for a blocking call in another thread. SIGINT ends the wait."""
    reader, writer = os.pipe()
    try:
        before = time.monotonic()
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            interruptible(lambda: os.read(reader, 1))
        assert time.monotonic() - before < limit()
    finally:
        os.write(writer, b".")
        os.close(writer)
