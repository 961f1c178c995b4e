"""Adoption of QMP servers that pretend to be QEMU, and opening of descriptors that are replaced in the meantime."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pageferry.errors import UnsupportedError, WorkloadError
from pageferry.host import proc
from pageferry.host.registry import Registry
from pageferry.workloads.qemu.guest import QemuWorkload

PROGRAM = Path(__file__).with_name("fake_monitor.py")
SIZE = 1 << 20
OTHER_USER = 65534

VICTIM = """
import mmap, os, sys
fd = os.memfd_create("secret")
os.ftruncate(fd, 1 << 20)
memory = mmap.mmap(fd, 1 << 20)
memory[:6] = b"secret"
print(fd, flush=True)
sys.stdin.read()
"""

Start = Callable[..., tuple[str, int]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder on a tmpfs, writable by every user."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def fake(folder: Path) -> Iterator[Start]:
    """Yield a function that starts a fake monitor, and returns the socket's path and the serving process's pid."""
    started: list[tuple[subprocess.Popen[str], int | None]] = []

    def start(*wrapper: str, **options: Any) -> tuple[str, int]:
        path = str(folder / f"{len(started)}.sock")
        command = [*wrapper, sys.executable, str(PROGRAM), path, json.dumps({"size": SIZE} | options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        started.append((process, None if wrapper else os.pidfd_open(pid)))
        if options.get("server") == "orphan":
            process.wait()
        return path, pid

    yield start
    for process, server in started:
        if server is not None:
            signal.pidfd_send_signal(server, signal.SIGKILL)
            os.close(server)
        process.kill()
        process.communicate()


@pytest.fixture
def victim() -> Iterator[tuple[int, int]]:
    """Yield the pid of a process of our user that maps a memfd, and the number of the memfd's descriptor."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", VICTIM], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.kill()


def adopt(path: str) -> int:
    """Adopt the guest of a monitor, and return the guest's pid."""

    async def scenario() -> int:
        workload = await QemuWorkload.adopt("theirs", path)
        pid = workload.pid
        workload.close()
        Registry().remove("theirs")
        return pid

    return asyncio.run(scenario())


@pytest.mark.usefixtures("root")
def test_monitor_of_another_user_cannot_name_our_process(fake: Start, victim: tuple[int, int]) -> None:
    pid, descriptor = victim
    path, _ = fake(uid=OTHER_USER, threads=[pid], mem_path=f"/proc/self/fd/{descriptor}")
    with pytest.raises(WorkloadError, match=f"vCPU threads that belong neither to process .* as user {OTHER_USER}"):
        adopt(path)
    assert not (Registry().path / "theirs").exists()


def test_monitor_of_our_user_cannot_name_a_process_it_did_not_start(fake: Start, victim: tuple[int, int]) -> None:
    pid, descriptor = victim
    path, _ = fake(threads=[pid], mem_path=f"/proc/self/fd/{descriptor}")
    with pytest.raises(WorkloadError, match="vCPU threads that belong neither to process"):
        adopt(path)


def test_monitor_whose_listener_has_exited_is_not_trusted(fake: Start, folder: Path) -> None:
    memory = ram_file(folder)
    path, _ = fake(mem_path=memory, map="rw", server="orphan")
    with pytest.raises(WorkloadError, match="the process that created it has exited"):
        adopt(path)


def test_monitor_socket_inherited_from_launcher_identifies_the_serving_child(fake: Start, folder: Path) -> None:
    path, pid = fake(mem_path=ram_file(folder), map="rw", server="child")
    assert adopt(path) == pid


@pytest.mark.usefixtures("root")
def test_process_of_another_user_is_adopted_by_root(fake: Start, folder: Path) -> None:
    path, pid = fake(uid=OTHER_USER, mem_path=ram_file(folder), map="rw")
    assert adopt(path) == pid


@pytest.mark.usefixtures("root")
def test_process_in_child_pid_namespace_is_adopted_by_its_pid_in_ours(fake: Start, folder: Path) -> None:
    """The monitor reports thread 1 of its PID namespace. In our namespace, 1 is another process."""
    path, inner = fake("unshare", "--pid", "--fork", "--kill-child", mem_path=ram_file(folder), map="rw")
    assert inner == 1
    pid = adopt(path)
    assert proc.status(pid)[b"NSpid"] == [str(pid).encode(), b"1"]


@pytest.mark.usefixtures("root")
def test_process_outside_our_pid_namespace_is_refused(fake: Start, folder: Path) -> None:
    path, _ = fake(mem_path=ram_file(folder), map="rw")
    script = 'exec "$0" -m pageferry adopt theirs --qmp "$1"'
    words = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script, sys.executable, path]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "")
    assert "outside this PID namespace" in done.stderr


@pytest.mark.usefixtures("root")
def test_user_without_privileges_gets_named_error(fake: Start, folder: Path) -> None:
    path, _ = fake(mem_path=ram_file(folder), map="rw")
    program = f"""
import os, socket
from pageferry.host import qmp_peer
connection = socket.socket(socket.AF_UNIX)
connection.connect({path!r})
os.setgid({OTHER_USER})
os.setuid({OTHER_USER})
qmp_peer.find_process(qmp_peer.peer_of(connection), [1], {path!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "belongs to user 0; run pageferry as that user, or as root" in done.stderr


@pytest.mark.usefixtures("root")
def test_read_only_mapping_is_not_guest_memory(fake: Start, folder: Path) -> None:
    memory = ram_file(folder)
    os.chmod(memory, 0o644)
    path, _ = fake(uid=OTHER_USER, mem_path=memory, map="r")
    with pytest.raises(WorkloadError, match="not among the shared, writable mappings"):
        adopt(path)


@pytest.mark.parametrize(
    ("replies", "named"),
    [
        ({"human-monitor-command": "net0: index=0,type=vhost-vdpa,\r\n"}, "network vhost-vdpa"),
        ({"human-monitor-command": "v: index=0,type=nic,x\r\n \\ n: index=0,type=vhost-user,"}, "network vhost-user"),
        ({"query-named-block-nodes": [{"drv": "qcow2"}, {"drv": "nvme"}]}, "block driver nvme"),
        ({"query-named-block-nodes": [{"drv": "virtio-blk-vhost-vdpa"}]}, "block driver virtio-blk-vhost-vdpa"),
        ({"qom-list": [{"name": "c", "type": "child<cryptodev-vhost-user>"}]}, "object cryptodev-vhost-user"),
        ({"qom-list": [{"name": "d", "type": "child<vhost-vdpa-device-pci>"}]}, "device vhost-vdpa-device-pci"),
    ],
)
def test_adopted_guest_with_untraceable_writer_is_refused(
    fake: Start, folder: Path, replies: dict[str, Any], named: str
) -> None:
    path, _ = fake(mem_path=ram_file(folder), map="rw", replies=replies)
    with pytest.raises(UnsupportedError, match=f"{named}: .* without a trace"):
        adopt(path)
    assert not (Registry().path / "theirs").exists()


def ram_file(folder: Path) -> str:
    """Create a file for guest memory, and return its path."""
    path = folder / "ram"
    path.touch(mode=0o666)
    path.chmod(0o666)
    os.truncate(path, SIZE)
    return str(path)


# -- descriptors replaced between stat and open

SWAPPER = """
import mmap, os, sys
source = os.memfd_create("ram")
os.ftruncate(source, 1 << 20)
memory = mmap.mmap(source, 1 << 20)
source = os.dup2(source, 100)
other = os.dup2(os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK), 101)
for number in range(3, 100):
    try:
        os.close(number)
    except OSError:
        pass
print(flush=True)
while True:
    os.dup2(source, 50)
    os.dup2(other, 50)
"""


@pytest.mark.parametrize("kind", ["file", "fifo"])
def test_descriptor_replaced_during_open_never_opens_another_file(folder: Path, kind: str) -> None:
    target = folder / "other"
    if kind == "fifo":
        os.mkfifo(target, 0o600)
    else:
        target.write_bytes(b"secret")
    with subprocess.Popen([sys.executable, "-c", SWAPPER, str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            (mapping,) = [one for one in proc.file_mappings(process.pid) if one.shared and one.writable]
            opened = {_identity(proc.open_mapped_file(process.pid, mapping)) for _ in range(12000)}
        finally:
            process.kill()
    assert opened == {(mapping.device, mapping.inode)}


def _identity(descriptor: int) -> tuple[int, int]:
    try:
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino
    finally:
        os.close(descriptor)
