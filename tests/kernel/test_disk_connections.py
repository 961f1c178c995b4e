"""Tests of the socket to which the QEMU of a source connects for the copy of a disk."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pageferry.errors import WorkloadError
from pageferry.host import files
from pageferry.host.qmp import Monitor
from pageferry.workloads.qemu.control import QemuControl
from pageferry.workloads.qemu.disk_mirrors import QemuMirrors

OTHER_USER = 65534
CLIENT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(1))"


class Commands:
    """Monitor in `folder` that executes `blockdev-add` by calling a function with the path to connect to."""

    def __init__(self, folder: Path, connect: Callable[[str], None]) -> None:
        self.path = str(folder / "qmp")
        self._connect = connect

    async def execute(self, command: str, **arguments: Any) -> None:
        assert command == "blockdev-add"
        await asyncio.to_thread(self._connect, arguments["server"]["path"])


def connects(folder: Path, pid: int, connect: Callable[[str], None]) -> int:
    """Connect the process `pid` to an export. Check that no file is left. Return the number of accepted connections."""
    accepted = []

    def carry(connection: socket.socket) -> None:
        connection.sendall(b"accepted")
        accepted.append(connection.fileno())

    mirrors = QemuMirrors(cast(QemuControl, None), pid, {}, 1 << 20)
    monitor = cast(Monitor, Commands(folder, connect))
    try:
        asyncio.run(mirrors._connect(monitor, "disk", carry))
    finally:
        assert list(folder.iterdir()) == []
    return len(accepted)


def test_connection_of_another_process_is_closed_and_the_next_accepted(tmp_path: Path) -> None:
    def connect(path: str) -> None:
        client = subprocess.run([sys.executable, "-c", CLIENT, path], capture_output=True, timeout=20, check=True)
        assert client.stdout == b"b''\n"
        with socket.socket(socket.AF_UNIX) as ours:
            ours.connect(path)
            assert ours.recv(8) == b"accepted"

    assert connects(tmp_path, os.getpid(), connect) == 1


@pytest.mark.usefixtures("root")
def test_socket_belongs_to_the_user_of_qemu_in_a_folder_that_this_user_cannot_write_to(tmp_path: Path) -> None:
    os.chown(tmp_path, OTHER_USER, OTHER_USER)
    found: list[os.stat_result] = []

    def look(path: str) -> None:
        found.extend((os.lstat(path), os.lstat(os.path.dirname(path))))
        raise WorkloadError("not connected")

    with subprocess.Popen(["sleep", "60"], user=OTHER_USER) as other:
        try:
            with pytest.raises(WorkloadError, match="not connected"):
                connects(tmp_path, other.pid, look)
        finally:
            other.kill()
    entry, folder = found
    assert (entry.st_uid, stat.S_IFMT(entry.st_mode), entry.st_mode & 0o077) == (OTHER_USER, stat.S_IFSOCK, 0)
    assert (folder.st_uid, stat.S_IMODE(folder.st_mode)) == (os.geteuid(), 0o711)


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_replaced_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(0o700)
    (victim / "file").touch()

    def replaced(path: Path, mode: int) -> None:
        if kind == "link":
            path.symlink_to(victim)
        else:
            victim.rename(path)

    monkeypatch.setattr(Path, "mkdir", replaced)
    with pytest.raises(OSError, match=r"replaced|Not a directory"), files.private_folder(tmp_path / "new"):
        pass
    found = victim if kind == "link" else tmp_path / "new"
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    assert (found / "file").exists()
