"""Processes that share an arena's memory: each process is traced, or the operation fails and names the process."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pageferry
from pageferry._engine import Space
from pageferry.errors import WorkloadError
from pageferry.memory import mappers
from pageferry.memory.view import Memory
from pageferry.workloads.arena.arena import Arena
from tests.kernel import mapper, moving
from tests.kernel.programs import Program, wait_until
from tests.kernel.target import Target

MIB = 1 << 20
PROGRAM = f"{shlex.quote(sys.executable)} {shlex.quote(mapper.__file__)}"

pytestmark = pytest.mark.usefixtures("root")


class Writers:
    """Processes that write to an arena of the test. SIGSTOP stops them while the arena is paused."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.arena = Arena(2 * MIB, on_pause=self.pause, on_resume=self.resume)
        memoryview(self.arena)[:] = os.urandom(2 * MIB)
        self.files: list[Any] = []

    def pause(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda pid=pid: moving.state(pid) == "T", "the process to stop")

    def resume(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)

    def run(self, command: str, *descriptors: int) -> int:
        """Run a shell command, and return the pid that the command prints. With `&`, the shell exits at once."""
        shell = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, text=True, pass_fds=descriptors)
        self.files.append(shell)
        assert shell.stdout is not None
        ready, _, _ = select.select([shell.stdout], [], [], 30)
        assert ready, command
        pid = int(shell.stdout.readline())
        self.pids.append(pid)
        return pid

    def close(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for shell in self.files:
            shell.kill()
            shell.wait()
            shell.stdout.close()


@pytest.fixture
def writers() -> Iterator[Writers]:
    found = Writers()
    try:
        yield found
    finally:
        found.close()


def fork(writers: Writers) -> None:
    ready, end = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(end, 1)
        mapper.write(writers.arena.fileno())
    writers.pids.append(child)
    os.close(end)
    with open(ready) as lines:
        lines.readline()


def spawn(writers: Writers) -> None:
    file = writers.arena.fileno()
    writers.run(f"exec {PROGRAM} {file} write", file)


def orphan(writers: Writers) -> None:
    """Start a writer whose parent has exited."""
    file = writers.arena.fileno()
    writers.run(f"{PROGRAM} {file} write &", file)


def received(writers: Writers) -> None:
    """Start a writer without inherited descriptors, and pass the descriptor of the memory to it (SCM_RIGHTS)."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        command = f"({PROGRAM} socket:{path} write &)"
        shell = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, text=True)
        writers.files.append(shell)
        wait_until(lambda: os.path.exists(path), "the socket to exist")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            socket.send_fds(connection, [b"memory"], [writers.arena.fileno()])
        assert shell.stdout is not None
        writers.pids.append(int(shell.stdout.readline()))


def opened(writers: Writers) -> None:
    """Start a writer that opens the memory through /proc/PID/fd/N, without the program's knowledge."""
    number = next(name for name in os.listdir("/proc/self/fd") if _is_memory(writers.arena, name))
    writers.run(f"{PROGRAM} /proc/{os.getpid()}/fd/{number} write &")


def other_namespace(writers: Writers) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare program")
    file = f"/proc/{os.getpid()}/fd/{writers.arena.fileno()}"
    writers.run(f"exec unshare --pid --fork {PROGRAM} {file} write")
    shell = writers.files[-1].pid
    (child,) = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
    writers.pids[-1] = int(child)


def _is_memory(arena: Arena, name: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(f"/proc/self/fd/{name}"), os.fstat(arena.fileno()))
    return False


def is_one_snapshot(image: Path) -> bool:
    """Return whether an image is one snapshot: its first pages are of one round, any others of the previous one."""
    rounds = memoryview(pageferry.restore(image)).cast("Q")[:: mapper.PAGE_WORDS].tolist()
    return rounds == sorted(rounds, reverse=True) and rounds[0] - rounds[-1] <= 1


WAYS = [fork, spawn, orphan, received, opened, other_namespace]


def test_process_between_fork_and_exec_is_not_taken_for_a_user_of_a_file(tmp_path: Path) -> None:
    """A scan can find a child with all mappings of its parent, which execve(2) in the child removes."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(MIB))
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), MIB)
    child = os.fork()
    if not child:
        time.sleep(0.1)
        os.execv("/bin/sleep", ["sleep", "60"])
    memory.close()
    try:
        mappers.refuse_in_use("guest", str(path), 0, MIB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_process_that_maps_a_file_for_writing_is_a_user(writers: Writers, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(MIB))
    pid = writers.run(f"exec {PROGRAM} {path} write")
    with pytest.raises(WorkloadError, match=f"process {pid} "):
        mappers.refuse_in_use("guest", str(path), 0, MIB)


def test_process_that_ends_soon_is_a_user(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(MIB))
    script = (
        "import mmap, sys, time\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "memory = mmap.mmap(file.fileno(), 0)\n"
        "print(flush=True)\n"
        "time.sleep(0.1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        user.stdout.readline()
        with pytest.raises(WorkloadError, match=f"process {user.pid} "):
            mappers.refuse_in_use("guest", str(path), 0, MIB)


def test_injections_of_other_threads_are_not_taken_for_writers(tmp_path: Path) -> None:
    """The process that injects a system call has the memory and the descriptors of this program."""
    arena, stopped = Arena(4 * MIB), threading.Event()

    def inject() -> None:
        with Target() as target:
            space = Space(target.pid)
            while not stopped.is_set():
                space.getppid()

    thread = threading.Thread(target=inject)
    thread.start()
    try:
        for number in range(10):
            pageferry.checkpoint(arena, tmp_path / str(number))
    finally:
        stopped.set()
        thread.join()


@pytest.mark.parametrize("way", WAYS)
def test_image_is_of_one_snapshot_point(way: Callable[[Writers], None], writers: Writers, tmp_path: Path) -> None:
    way(writers)
    pageferry.checkpoint(writers.arena, tmp_path / "image", bandwidth=4 * MIB)
    assert is_one_snapshot(tmp_path / "image")


@pytest.mark.parametrize("way", [orphan, opened])
def test_migration_loses_no_write(way: Callable[[Writers], None], writers: Writers, tmp_path: Path) -> None:
    way(writers)
    script = (
        "import asyncio, pageferry, sys\n"
        "async def main():\n"
        "    say = lambda address: print(address, flush=True)\n"
        "    arena = await pageferry.receive_async('127.0.0.1:0', listening=say)\n"
        "    await pageferry.checkpoint_async(arena, sys.argv[1])\n"
        "asyncio.run(main())\n"
    )
    with Program("-c", script, str(tmp_path / "image")) as receiver:
        pageferry.migrate(writers.arena, receiver.line(), bandwidth=64 * MIB)
        assert receiver.wait() == 0
    assert is_one_snapshot(tmp_path / "image")
    expected = memoryview(writers.arena).cast("Q")[:: mapper.PAGE_WORDS].tolist()
    assert memoryview(pageferry.restore(tmp_path / "image")).cast("Q")[:: mapper.PAGE_WORDS].tolist() == expected


def test_second_mapping_of_the_program_is_traced() -> None:
    arena = Arena(MIB)
    again = mmap.mmap(arena.fileno(), MIB)
    (region,) = arena.workload().regions
    assert len(region.segments) == 2
    again.close()
    assert len(arena.workload().regions[0].segments) == 1


def test_views_of_pageferry_are_not_segments() -> None:
    arena = Arena(MIB)
    view = Memory(arena.workload())
    assert len(arena.workload().regions[0].segments) == 1
    del view


def test_process_that_could_write_to_the_descriptor_is_refused(writers: Writers, tmp_path: Path) -> None:
    file = writers.arena.fileno()
    pid = writers.run(f"exec {PROGRAM} {file} hold", file)
    with pytest.raises(WorkloadError, match=rf"process {pid} .*without a mapping"):
        pageferry.checkpoint(writers.arena, tmp_path / "image")


def test_read_only_mapping_is_not_refused(writers: Writers, tmp_path: Path) -> None:
    file = writers.arena.fileno()
    writers.run(f"exec {PROGRAM} {file} read", file)
    writers.pids.clear()
    assert len(writers.arena.workload().regions[0].segments) == 1
    pageferry.checkpoint(writers.arena, tmp_path / "image")


def test_process_that_maps_during_a_migration_is_refused(writers: Writers) -> None:
    """The migration fails before the pause, so the arena keeps running."""
    listening = "listening=lambda address: print(address, flush=True)"
    script = f"import pageferry; pageferry.receive('127.0.0.1:0', {listening})"
    with Program("-c", script) as receiver:
        address = receiver.line()

        async def main() -> None:
            moving_on = asyncio.create_task(
                pageferry.migrate_async(writers.arena, address, bandwidth=MIB // 2, codec="none")
            )
            await asyncio.sleep(0.5)
            await asyncio.to_thread(spawn, writers)
            await moving_on

        with pytest.raises(WorkloadError, match=r"process \d+ .*mapped the memory during"):
            asyncio.run(main())
    assert writers.arena.status == "running"


USER = """
import asyncio, ctypes, multiprocessing.reduction, os, sys
import pageferry.checkpoints.save, pageferry.workloads.arena.arena
from pageferry.errors import UnsupportedError
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, without which root would own the process's /proc files
arena = pageferry.Arena(1 << 20)
pageferry.checkpoint(arena, sys.argv[1] + "/kept", mode="stop")
arena.fileno()
try:
    pageferry.checkpoint(arena, sys.argv[1] + "/given", mode="stop")
except UnsupportedError as refused:
    print(refused)
"""


def test_user_who_cannot_scan_processes_is_refused_after_descriptor_was_handed_out() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        environment = os.environ | {"PAGEFERRY_RUN_DIR": f"{folder}/run"}
        done = subprocess.run([sys.executable, "-c", USER, folder], capture_output=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr
        assert b"run as root" in done.stdout
        assert sorted(os.listdir(folder)) == ["kept"]


def test_trace_is_not_used_after_descriptor_was_handed_out(tmp_path: Path) -> None:
    """Between the checkpoints, another process may have mapped the memory, written to it and exited."""
    arena = Arena(MIB)
    memoryview(arena)[:5] = b"ferry"
    pageferry.checkpoint(arena, tmp_path / "0", track=True)
    script = "import mmap, sys; memory = mmap.mmap(int(sys.argv[1]), 1 << 20); memory[8192:8197] = b'ferry'"
    file = arena.fileno()
    subprocess.run([sys.executable, "-c", script, str(file)], pass_fds=[file], check=True, timeout=60)
    pageferry.checkpoint(arena, tmp_path / "1", parent=tmp_path / "0")
    assert bytes(memoryview(pageferry.restore(tmp_path / "1"))[8192:8197]) == b"ferry"


def test_scan_is_short() -> None:
    arena = Arena(MIB)
    workload = arena.workload()
    before = time.perf_counter()
    for _ in range(10):
        asyncio.run(workload.check_mappers())
    assert (time.perf_counter() - before) / 10 < 0.5


FULL_SCAN = """
import errno, os, resource, sys
from pageferry._engine import scan_mappers
status = os.fstat(0)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
opened = []
try:
    while True:
        opened.append(os.dup(0))
except OSError as failed:
    assert failed.errno == errno.EMFILE
for descriptor in opened[-2:]:  # for /proc itself
    os.close(descriptor)
try:
    scan_mappers([(status.st_dev, status.st_ino, status.st_dev)])
except OSError as failed:
    print(errno.errorcode[failed.errno])
"""


def test_scan_that_lacks_descriptors_fails_instead_of_missing_processes() -> None:
    with tempfile.TemporaryFile() as file:
        found = subprocess.run([sys.executable, "-c", FULL_SCAN], stdin=file, capture_output=True, text=True)
    assert found.stdout == "EMFILE\n", found.stderr
