"""Tests of starting, listing and stopping guests from the command line, and of the cleanup after failed starts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pageferry.errors import NoSuchWorkload, UnsupportedError, UsageError, WorkloadError
from pageferry.host import proc
from pageferry.host.registry import Registry
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts

TIMEOUT = 60.0


def pageferry(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "pageferry", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def listed() -> list[dict[str, Any]]:
    return [json.loads(line) for line in pageferry("list", "--output", "json").stdout.splitlines()]


@pytest.mark.oldest_qemu
def test_run_list_and_stop(parts: GuestParts, registry: Registry) -> None:
    started = pageferry("run", "web", "--detach", "--output", "json", "--", *parts.bare("-m", "64M"))
    assert (started.returncode, started.stderr if os.geteuid() == 0 else "") == (0, "")
    (workload,) = listed()
    assert workload | {"resident": 0} == {
        "type": "workload",
        "name": "web",
        "kind": "qemu",
        "pid": json.loads(started.stdout)["pid"],
        "status": "running",
        "memory": 64 << 20,
        "resident": 0,
        "deferred": 0,
        "reason": None,
        "stall-reason": None,
        "overlays": [],
    }
    assert 0 < workload["resident"] <= 64 << 20

    async def pause() -> None:
        guest = await QemuWorkload.attach("web")
        await guest.pause()
        await guest.commit()
        guest.close()

    asyncio.run(pause())
    header, row = pageferry("list").stdout.splitlines()
    assert header.split() == ["NAME", "KIND", "PID", "STATUS", "MEMORY", "RESIDENT", "DEFERRED"]
    assert row.split()[:5] == ["web", "qemu", str(workload["pid"]), "paused", "64"]

    assert pageferry("run", "web", "--", *parts.bare()).returncode == 12
    assert pageferry("stop", "web").returncode == 0
    assert proc.start_time(workload["pid"]) is None
    assert pageferry("stop", "web").returncode == 11
    assert listed() == []


def test_busy_guest_is_listed_and_can_be_killed(parts: GuestParts, registry: Registry) -> None:
    async def scenario() -> int:
        guest = await QemuWorkload.start("web", parts.bare("-m", "64M"))
        await guest.pause()  # the QMP session stays open, so QEMU refuses others
        (workload,) = await asyncio.to_thread(listed)
        assert (workload["status"], workload["memory"]) == ("busy", None)
        stopped = await asyncio.to_thread(pageferry, "stop", "--kill", "web")
        assert stopped.returncode == 0
        code = await guest.ended()
        guest.close()
        return code or 0

    assert asyncio.run(scenario()) == -signal.SIGKILL


def start_in_foreground(parts: GuestParts) -> subprocess.Popen[str]:
    """Start `pageferry run` with QEMU's monitor on its standard streams, and wait until the guest is registered."""
    words = ["run", "web", "--", *parts.bare("-m", "64M", "-monitor", "stdio")]
    pipe = subprocess.PIPE
    command = subprocess.Popen(
        [sys.executable, "-m", "pageferry", *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert command.stderr is not None
    assert command.stderr.readline().startswith("web: running as process")
    return command


def test_foreground_guest_ends_on_ctrl_c(parts: GuestParts, registry: Registry) -> None:
    with start_in_foreground(parts) as command:
        (workload,) = listed()
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=TIMEOUT)
    assert command.returncode == 128 + signal.SIGINT
    assert "Traceback" not in errors
    assert proc.start_time(workload["pid"]) is None


@pytest.mark.parametrize(("says", "code"), [("quit", 0), ("", 10)])
def test_foreground_command_reports_how_its_guest_ended(
    parts: GuestParts, registry: Registry, says: str, code: int
) -> None:
    """QEMU uses the command's standard streams. The command fails if QEMU fails or is killed, and names the signal."""
    with start_in_foreground(parts) as command:
        if not says:
            os.kill(listed()[0]["pid"], signal.SIGKILL)
        output, errors = command.communicate(f"{says}\n", timeout=TIMEOUT)
    assert "monitor" in output
    assert (command.returncode, "was killed by SIGKILL" in errors) == (code, not says)


@pytest.mark.parametrize("detach", [True, False])
def test_failed_start_of_qemu_leaves_no_workload(parts: GuestParts, registry: Registry, detach: bool) -> None:
    with pytest.raises(WorkloadError, match="it exited with exit code 1") as caught:
        asyncio.run(QemuWorkload.start("web", parts.bare("-device", "no-such-device"), detach=detach))
    assert ("'no-such-device' is not a valid device" in str(caught.value)) is detach
    assert not (registry.path / "web").exists()


def test_start_of_a_missing_program_leaves_no_workload(registry: Registry) -> None:
    with pytest.raises(UsageError, match="cannot run /no/such/qemu"):
        asyncio.run(QemuWorkload.start("web", ["/no/such/qemu"]))
    assert not (registry.path / "web").exists()


def test_cancelled_start_leaves_no_workload(parts: GuestParts, registry: Registry, tmp_path: Path) -> None:
    """While QEMU waits for a client of its serial line, it does not serve its monitor."""
    options = ["-chardev", f"socket,id=c,path={tmp_path}/serial,server=on,wait=on", "-serial", "chardev:c"]

    async def scenario() -> None:
        starting = asyncio.create_task(QemuWorkload.start("web", parts.bare(*options)))
        while "web" not in registry.entries():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(scenario())
    assert not (registry.path / "web").exists()


def test_killed_guest_is_not_listed(parts: GuestParts, registry: Registry) -> None:
    async def scenario() -> None:
        guest = await QemuWorkload.start("web", parts.bare("-m", "64M"))
        os.kill(guest.pid, signal.SIGKILL)
        await guest.ended()
        guest.close()

    asyncio.run(scenario())
    with pytest.raises(NoSuchWorkload):
        registry.lookup("web")


@pytest.mark.usefixtures("root")
def test_start_without_free_huge_pages_reports_how_many_to_add(parts: GuestParts, registry: Registry) -> None:
    with pytest.raises(
        UnsupportedError, match=r"1048576 free pages of 2 MiB are required, \d+ are available; add \d+ to"
    ):
        asyncio.run(QemuWorkload.start("web", parts.bare("-m", "2T"), hugetlb=True))
    with pytest.raises(UnsupportedError, match="not a multiple of 2 MiB"):
        asyncio.run(QemuWorkload.start("web", parts.bare("-m", "63M"), hugetlb=True))
