"""Address spaces of other processes: injected system calls, collapse of memory into huge pages, and errors."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest

from pageferry._engine import LARGE_PAGE, SMALL_PAGE, MappedSegment, Mapping, Space, Trace
from tests.kernel.backing import backing
from tests.kernel.target import Target

SLOTS = LARGE_PAGE // SMALL_PAGE


def test_system_call_is_made_in_the_process() -> None:
    with Target() as target:
        assert Space(target.pid).getppid() == os.getpid()
        with pytest.raises(OSError, match="injected system call failed") as failed:
            Space(target.pid).close_fd(9999)
        assert failed.value.errno == errno.EBADF


def test_process_with_several_threads_keeps_running() -> None:
    code = "import threading, time\nfor _ in range(8): threading.Thread(target=time.sleep, args=(0.3,)).start()\n"
    with subprocess.Popen(["python3", "-c", code]) as process:
        for _ in range(50):
            assert Space(process.pid).getppid() == os.getpid()
        assert process.wait(20) == 0


def test_calls_work_after_execve() -> None:
    """The address at which calls are injected changes with each execve(2). The process must not stay stopped."""
    script = 'exec /bin/sh -c "$0" "$0"'
    with subprocess.Popen(["/bin/sh", "-c", script, script]) as process:
        try:
            for _ in range(100):
                try:
                    assert Space(process.pid).getppid() == os.getpid()
                except OSError as error:
                    assert "keeps executing new programs" in str(error)  # noqa: PT017 (both outcomes are correct)
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert "TracerPid:\t0\n" in status
            assert process.poll() is None
        finally:
            process.kill()


def test_concurrent_adoptions_of_one_process_succeed_or_are_refused() -> None:
    """Only one thread at a time can trace the process. The others get an error, and the process survives."""
    refused: list[PermissionError] = []

    def adopt(pid: int) -> None:
        for _ in range(30):
            try:
                assert Space(pid).getppid() == os.getpid()
            except PermissionError as error:
                refused.append(error)

    with Target() as target:
        threads = [threading.Thread(target=adopt, args=(target.pid,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Space(target.pid).getppid() == os.getpid()
    assert all("traced" in str(error) for error in refused)


def test_exited_process_is_an_error() -> None:
    target = Target()
    space = Space(target.pid)
    with target:
        target.kill()
    with pytest.raises(ProcessLookupError):
        space.getppid()
    with pytest.raises(ProcessLookupError):
        Space(target.pid)


def test_no_descriptor_is_left_behind() -> None:
    with backing("small", LARGE_PAGE) as (fd,), Target(fd) as target:
        address = target.order("map", fd, LARGE_PAGE)
        before = sorted(os.listdir(f"/proc/{target.pid}/fd"))
        for _ in range(20):
            Trace([MappedSegment(Space(target.pid), address, LARGE_PAGE)]).remove()
        assert sorted(os.listdir(f"/proc/{target.pid}/fd")) == before


@pytest.mark.parametrize("kind", ["small", "large"])
def test_large_mappings_are_made_from_outside(kind: str) -> None:
    """The pages of a memfd, which has no huge pages by default, are collapsed into huge pages."""
    with backing(kind, 2 * LARGE_PAGE) as (fd,), Target(fd) as target:
        mapping = Mapping(fd, 2 * LARGE_PAGE)
        content = random.Random(4).randbytes(2 * LARGE_PAGE)
        memory = memoryview(mapping).cast("B")
        memory[:] = content
        assert mapping.large_units() == [kind == "large"] * 2
        address = target.order("map", fd, 2 * LARGE_PAGE)
        Space(target.pid).collapse(address, 2 * LARGE_PAGE)
        assert target.order("touch", address, 2 * SLOTS, False) == 0
        assert target.order("touch", address, 2 * SLOTS, True) == 0
        assert memory[5:LARGE_PAGE] != content[5:LARGE_PAGE], "the target must write to the same pages"
        memory.release()
        again = Mapping(fd, 2 * LARGE_PAGE)
        assert again.large_units() == [True, True]


def test_uncollapsible_memory_is_an_error() -> None:
    with backing("small", 2 * LARGE_PAGE) as (fd,):
        mapping = Mapping(fd, 2 * LARGE_PAGE)
        trace = Trace([MappedSegment(Space(), mapping.address, LARGE_PAGE)])
        with pytest.raises(OSError, match="Invalid argument") as refused:
            Space().collapse(mapping.address, LARGE_PAGE)
        assert refused.value.errno == errno.EINVAL
        trace.remove()


def test_holes_of_hugetlbfs_stay_holes() -> None:
    with backing("hugetlb", 8 * LARGE_PAGE) as (fd,):
        mapping = Mapping(fd, 8 * LARGE_PAGE)
        memory = memoryview(mapping).cast("B")
        memory[LARGE_PAGE] = memory[2 * LARGE_PAGE] = memory[7 * LARGE_PAGE + 9] = 1
        memory.release()
        for _ in range(2):
            assert mapping.data_ranges() == [(LARGE_PAGE, 3 * LARGE_PAGE), (7 * LARGE_PAGE, 8 * LARGE_PAGE)]
        assert mapping.large_units() == [False, True, True, False, False, False, False, True]
        assert os.fstat(fd).st_blocks * 512 == 3 * LARGE_PAGE
