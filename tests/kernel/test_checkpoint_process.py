"""Checkpoints of any process's memory, saved while the process is stopped. Images can be read, but not restored."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pageferry
from pageferry.errors import UnsupportedError, UsageError, WorkloadDied
from pageferry.host import fault_points
from pageferry.images.image import ImageFile
from pageferry.workloads.process import ProcessWorkload
from tests.kernel.programs import Program, wait_until

HOLDER = """
import ctypes, mmap, sys, time
memory = mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[1 << 20 : (1 << 20) + 8192] = b"ferry" * 1638 + b"!!"
print(hex(ctypes.addressof(ctypes.c_char.from_buffer(memory))), flush=True)
count = 0
while True:
    count += 1
    memory[0:8] = memory[4 << 20 : (4 << 20) + 8] = count.to_bytes(8, "little")
"""


@pytest.fixture
def holder() -> Iterator[tuple[Program, int]]:
    """Run a program that writes a counter to two pages. Yield the program and the address of its memory."""
    with Program("-c", HOLDER) as program:
        yield program, int(program.line(), 16)


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11])


def test_range_is_saved_at_one_snapshot_point(holder: tuple[Program, int], tmp_path: Path) -> None:
    program, address = holder
    pid = program.process.pid
    workload = ProcessWorkload(pid, f"{address:x}-{address + (8 << 20):x}")
    result = pageferry.checkpoint(workload, tmp_path / "image")
    workload.close()
    assert result.mode == "stop"
    assert result.pages.absent >= 2000
    image = ImageFile(tmp_path / "image")
    assert (image.metadata.kind, image.metadata.restorable, image.state()) == ("process", False, b"")
    assert image.read(256, 2) == b"ferry" * 1638 + b"!!"
    first, second = (int.from_bytes(image.read(page, 1)[:8], "little") for page in (0, 1024))
    assert first - second in (0, 1)
    before = ticks(pid)
    wait_until(lambda: ticks(pid) > before, "the workload to run")


def test_regions_are_selected_by_name(holder: tuple[Program, int], tmp_path: Path) -> None:
    pid = str(holder[0].process.pid)
    command = [sys.executable, "-m", "pageferry", "checkpoint", f"pid:{pid}", str(tmp_path / "image")]
    subprocess.run([*command, "--regions", "heap,stack"], check=True, timeout=60, capture_output=True)
    names = [region.name for region in ImageFile(tmp_path / "image").metadata.regions]
    assert [name.split()[-1] for name in names] == ["[heap]", "[stack]"]
    subprocess.run([*command, "--regions", "anon"], check=True, timeout=60, capture_output=True)
    assert len(ImageFile(tmp_path / "image").metadata.regions) > 2
    done = subprocess.run(command, timeout=60, capture_output=True)
    assert done.returncode == UsageError.exit_code
    assert b"--regions" in done.stderr


@pytest.mark.parametrize("ranges", ["", "nowhere", "1-2", "2000-1000", "heap,,stack"])
def test_unknown_regions_are_refused(holder: tuple[Program, int], ranges: str) -> None:
    with pytest.raises(UsageError):
        ProcessWorkload(holder[0].process.pid, ranges)


def test_own_and_exited_process_are_refused() -> None:
    with pytest.raises(UsageError):
        ProcessWorkload(os.getpid(), "heap")
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(WorkloadDied):
        ProcessWorkload(child.pid, "heap")


def test_process_cannot_be_migrated(holder: tuple[Program, int]) -> None:
    workload = ProcessWorkload(holder[0].process.pid, "heap")
    with pytest.raises(UnsupportedError):
        pageferry.migrate(workload, "/nowhere")  # type: ignore[arg-type]
    workload.close()


def test_stopped_process_stays_stopped(holder: tuple[Program, int], tmp_path: Path) -> None:
    pid = holder[0].process.pid
    os.kill(pid, signal.SIGSTOP)
    workload = ProcessWorkload(pid, "heap")
    wait_until(lambda: not asyncio.run(workload.running()), "the process to stop")
    pageferry.checkpoint(workload, tmp_path / "image")
    assert not asyncio.run(workload.running())
    workload.close()


def test_process_resumes_when_saver_is_killed(holder: tuple[Program, int], tmp_path: Path) -> None:
    pid = holder[0].process.pid
    command = ("-m", "pageferry", "checkpoint", f"pid:{pid}", str(tmp_path / "image"), "--regions", "anon")
    environment = {**os.environ, fault_points.VARIABLE: "checkpoint.saved=stop"}
    with Program(*command, "--output", "json", env=environment) as saver:
        assert saver.json()["type"] == "armed"
        time.sleep(0.1)
        saver.kill()
    before = ticks(pid)
    wait_until(lambda: ticks(pid) > before, "the workload to run")
    assert os.listdir(tmp_path) == []
