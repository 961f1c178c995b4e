"""Truncation of the file that backs a workload: operations fail with a named error, and publish no image."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pageferry.workloads.arena.arena import memory_file
from tests.kernel.moving import address_of, environment, receiver, stopped
from tests.kernel.programs import Program

pytestmark = pytest.mark.usefixtures("root")

MIB = 1 << 20
OWNER = """
import os, sys, pageferry
arena = pageferry.Arena(16 << 20, "short", on_pause=lambda: None)
memoryview(arena)[:] = bytes([7]) * (16 << 20)
print("ready", flush=True)
for line in sys.stdin:
    os.ftruncate(arena.fileno(), 4 << 20)
    print("truncated", flush=True)
"""
CHECKPOINT = ["start", "checkpoint.armed", "checkpoint.instant"]
MIGRATE = ["start", "source.set-up", "source.paused"]


def truncated_at(point: str, *arguments: str) -> tuple[int, str]:
    """Run a command. Truncate the memory before the command starts, or while the command is stopped at `point`.

    Return the exit code, and the command's output on standard error.
    """
    fault = None if point == "start" else f"{point}=stop"
    with Program("-c", OWNER, env=environment(None)) as owner:
        assert owner.line() == "ready"
        if point == "start":
            truncate(owner)
        with Program("-m", "pageferry", *arguments, env=environment(fault), stderr=subprocess.PIPE) as command:
            if point != "start":
                stopped(command)
                truncate(owner)
                command.process.send_signal(signal.SIGCONT)
            code = command.wait()
            assert command.process.stderr is not None
            with command.process.stderr as stderr:
                said = stderr.read().decode()
        assert owner.process.poll() is None
        return code, said


def truncate(owner: Program) -> None:
    owner.say("truncate")
    assert owner.line() == "truncated"


@pytest.mark.parametrize("point", CHECKPOINT)
@pytest.mark.parametrize("mode", ["lazy", "stop"])
def test_checkpoint_of_truncated_memory_is_an_error_and_leaves_no_image(tmp_path: Path, mode: str, point: str) -> None:
    if mode == "stop" and point != "start":
        pytest.skip(f"mode stop does not reach fault point {point}")
    code, said = truncated_at(point, "checkpoint", "short", str(tmp_path / "image"), "--mode", mode)
    assert (code, "was truncated" in said) == (10, True), said
    assert not (tmp_path / "image").exists()


@pytest.mark.parametrize("point", MIGRATE)
def test_migration_of_truncated_memory_is_an_error(point: str) -> None:
    with receiver("elsewhere") as there:
        code, said = truncated_at(point, "migrate", "short", address_of(there))
        assert (code, "was truncated" in said) == (10, True), said


def test_access_beyond_the_end_of_a_file_ends_our_process_with_a_message() -> None:
    code = (
        "import os; from pageferry import _engine; f = os.memfd_create('m'); os.ftruncate(f, 8192); "
        "m = _engine.Mapping(f, 8192); getattr(_engine, 'end_on_truncation', print)(10); os.ftruncate(f, 0); "
        "memoryview(m)[4096]"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, "was truncated" in ended.stderr) == (10, True), ended


def test_memory_without_large_pages_cannot_be_truncated() -> None:
    file, how = memory_file(MIB, large_pages=False)
    try:
        assert how == "none"
        with pytest.raises(PermissionError) as refused:
            os.ftruncate(file, 4096)
        assert refused.value.errno == errno.EPERM
    finally:
        os.close(file)
