"""Tests of /proc with hostile contents: names of processes and files with any byte except NUL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pageferry.host import proc, processes, smaps
from pageferry.large_pages import sampler
from pageferry.workloads.process import ProcessWorkload

LENGTH = 16 << 10
FORGED = b"10000-20000 rw-s 00000000 00:01 4711 /forged"

PROGRAM = """
import ctypes, mmap, os, sys
name, path = (os.fsencode(word) for word in sys.argv[1:])
ctypes.CDLL(None).prctl(15, name, 0, 0, 0)
if path:
    with open(path, "w+b") as file:
        file.truncate(16 << 10)
        memory = mmap.mmap(file.fileno(), 16 << 10)
        memory[:1] = b"x"
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def process(name: bytes = b"plain", path: bytes = b"") -> Iterator[int]:
    """Start a child that sets its name and, unless `path` is empty, creates and maps that file. Yield the pid."""
    command: list[str | bytes] = [sys.executable, "-c", PROGRAM, name, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield child.pid
        finally:
            child.kill()


NAMES = [b"\xff\xfe\xfd", b"a) R 1 1 (b", b"a\x0bTgid:\t1", b"a\nTgid:\t1", b"a\x85b\x1cc\x1dd", b"%s\x1b[2J"]


@pytest.mark.parametrize("name", NAMES)
def test_process_with_hostile_name_is_described_and_blocks_no_search(name: bytes) -> None:
    with process(name) as pid:
        assert pid in processes.descendants(os.getpid())
        started = proc.start_time(pid)
        assert started is not None
        assert proc.is_alive(pid, started)
        workload = ProcessWorkload(pid, "heap")
        workload.close()
        command = workload.identity.details["command"]
        command.encode()  # fails if the text is not valid UTF-8, which JSON requires
        assert str(command) == name.decode("utf-8", "backslashreplace")


FILES = [
    b"\xff\xfe",
    b"x (deleted)",
    b"x\x0b" + FORGED.replace(b"/", b"_"),
    b"x\n" + FORGED.replace(b"/", b"_"),
    b"x\x85\x1c\x1d\x1e\x0c" + FORGED.replace(b"/", b"_"),
    b"Rss: 1 kB",
    b"VmFlags: wr",
    b"[heap]",
    b"x [vdso]",
    b"  ",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("deleted", [False, True])
def test_mapped_file_with_hostile_name_is_found_and_forges_nothing(tmp_path: Path, name: bytes, deleted: bool) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    with process(path=path) as pid:
        status = os.stat(path)
        if deleted:
            os.unlink(path)
        found = list(proc.file_mappings(pid))
        ours = [one for one in found if one.inode == status.st_ino and one.shared]
        assert [one.length for one in ours] == [LENGTH]
        assert [one for one in found if one.inode == 4711 or one.address == 0x10000] == []
        records = smaps.smaps(pid)
        assert [one.mapping for one in records if one.mapping.inode] == found
        (record,) = [one for one in records if one.mapping == ours[0]]
        assert record.counts["Rss"] == 4096
        assert {"sh", "wr"} <= record.flags
        # A path that resembles a counter line is not parsed as a counter: all records have the same counters.
        assert all(one.counts.keys() == records[0].counts.keys() for one in records)
        workload = ProcessWorkload(pid, "heap")
        workload.close()
        assert [region.length for region in workload.regions] == [
            one.mapping.length for one in records if one.mapping.path in (b"[heap]", "[heap]")
        ]


def test_process_named_as_a_kernel_thread_is_not_mistaken_for_one() -> None:
    before = sampler._damon_runs.__wrapped__()
    with process(b"kdamond.0"):
        assert sampler._damon_runs.__wrapped__() == before


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("device", [b"-", b"", b"a b", b"\xff", b"a\nb"])
def test_mount_with_hostile_device_name_hides_no_control_group(tmp_path: Path, device: bytes) -> None:
    program = "from pageferry.host.cpu_quota import mounts; print(sorted(str(mount.point) for mount in mounts()))"
    script = 'mount -t tmpfs -- "$1" "$2" && exec "$3" -c "$4"'
    words: list[str | bytes] = [
        "unshare",
        "-m",
        "sh",
        "-c",
        script,
        "sh",
        device,
        str(tmp_path),
        sys.executable,
        program,
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    plain = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    if "mount:" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.stdout, done.stderr) == (plain.stdout, "")


def test_process_lives_while_a_thread_outlives_its_main_thread() -> None:
    program = """
import ctypes, threading, time
threading.Thread(target=lambda: time.sleep(60)).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)  # exits only the main thread
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            started = int(_stat(child.pid)[19])
            while _stat(child.pid)[0] != b"Z":
                pass
            assert proc.is_alive(child.pid, started)
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            assert not proc.is_alive(child.pid, started)
        finally:
            child.kill()


def _stat(pid: int) -> list[bytes]:
    text = Path(f"/proc/{pid}/stat").read_bytes()
    return text[text.rindex(b")") + 2 :].split()
