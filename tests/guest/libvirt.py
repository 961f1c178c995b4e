"""libvirt daemon of the tests, with separate configuration, state and sockets, and domains of this daemon.

The daemon runs as root in a private mount namespace, with an empty tmpfs over each directory of libvirt, so that it
neither reads nor changes the libvirt of the machine. It needs no systemd, D-Bus or network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.sax.saxutils import quoteattr

import pytest

PROGRAMS = ("libvirtd", "virsh", "unshare", "mount")
TIMEOUT = 60.0
_DRIVER = Path("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so")
_USER = 64055
"""User and group of libvirt's QEMU processes on Debian (libvirt-qemu)."""

_SCRIPT = f"""
set -e
for file in passwd group; do cp /etc/$file $1/$file; done
grep -q ^libvirt-qemu: $1/passwd ||
    echo libvirt-qemu:x:{_USER}:{_USER}::/var/lib/libvirt:/usr/sbin/nologin >>$1/passwd
grep -q ^libvirt-qemu: $1/group || echo libvirt-qemu:x:{_USER}: >>$1/group
grep -q ^kvm: $1/group || echo kvm:x:{_USER + 1}: >>$1/group
for file in passwd group; do mount --bind $1/$file /etc/$file; done
for folder in /etc/libvirt /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
    mkdir -p $folder
    mount -t tmpfs -o mode=755 tmpfs $folder
done
if [ -e /dev/kvm ]; then
    : >$1/no-kvm
    chmod 0 $1/no-kvm
    mount --bind $1/no-kvm /dev/kvm
fi
cp $1/libvirtd.conf $1/qemu.conf /etc/libvirt/
exec libvirtd --pid-file $1/libvirtd.pid
"""

_REAPER = """
import ctypes, os, signal, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
daemon = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: daemon.terminate())
while os.wait()[0] != daemon.pid:
    pass
"""
"""Program that runs the daemon and reaps orphaned QEMU processes. libvirt waits until an ended process no
longer exists, and the init process of a container may reap late."""


class Libvirt:
    """Running libvirt daemon. `folder`: directory that the user of QEMU can enter; `memory`: tmpfs with huge pages."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="libvirt-", dir="/tmp"))
        self.memory, self.sockets = self.folder / "memory", self.folder / "qmp"
        for path in (self.folder, self.memory, self.sockets, self.folder / "run"):
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
        os.chown(self.sockets, _USER, _USER)
        self.uri = f"qemu+unix:///system?socket={self.folder}/run/libvirt-sock"
        self._log = open(self.folder / "log", "wb")  # noqa: SIM115  # closed by __exit__
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        options = f"huge=always,mode=0700,uid={_USER},gid={_USER}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "pageferry-test", self.memory], check=True)
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._daemon is not None:
                for name in self.run("list", "--name").stdout.split():
                    self.run("destroy", name)
                self._daemon.terminate()
                self._daemon.wait(TIMEOUT)
        finally:
            self._log.close()
            subprocess.run(["umount", "--lazy", self.memory], check=True)
            shutil.rmtree(self.folder)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of virsh."""
        command = ["virsh", "--connect", self.uri, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)

    def state(self, name: str) -> str:
        """Return the state of a domain and the reason, such as `running (booted)`."""
        return self.run("domstate", name, "--reason").stdout.strip()

    def create(self, xml: str) -> None:
        """Start a domain that exists until it ends."""
        file = self.folder / "domain.xml"
        file.write_text(xml)
        done = self.run("create", str(file))
        assert done.returncode == 0, f"{done.stderr}\n{(self.folder / 'log').read_text()}"

    def readable(self, file: Path) -> Path:
        """Return a copy of a file that the user of QEMU can read, and whose owner libvirt may change."""
        copy = self.folder / file.name
        if not copy.exists():
            shutil.copyfile(file, copy)
            copy.chmod(0o755)
        return copy

    def _start(self) -> None:
        (self.folder / "libvirtd.conf").write_text(
            f'unix_sock_dir = "{self.folder}/run"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n'
        )
        (self.folder / "qemu.conf").write_text(
            'security_driver = "none"\nstdio_handler = "file"\ncgroup_controllers = []\nnamespaces = []\n'
            f'memory_backing_dir = "{self.memory}"\n'
        )
        separate = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _SCRIPT, "sh", str(self.folder)]
        command = [sys.executable, "-c", _REAPER, *separate]
        self._daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True
        )
        deadline = time.monotonic() + TIMEOUT
        while self.run("list").returncode != 0:
            assert self._daemon.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)


def require() -> None:
    """Skip the test unless libvirt is installed, and this process can mount file systems."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or not _DRIVER.exists():
        pytest.skip(f"no libvirt ({', '.join(missing) or _DRIVER}): `make system` as root installs it")
    if os.geteuid() != 0:
        pytest.skip("requires root: a private libvirt daemon mounts its directories")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot create a mount namespace")


def domain(name: str, emulator: Path, *, memory: str = "", devices: str = "", options: tuple[str, ...] = ()) -> str:
    """Return the XML of a domain of 128 MiB. `memory`: elements of its memory and its system; `options`: additional
    options of QEMU."""
    words = "".join(f"<qemu:arg value={quoteattr(word)}/>" for word in options)
    return (
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
        f"<name>{name}</name><memory unit='MiB'>128</memory>{memory}"
        f"<features><acpi/></features><devices><emulator>{emulator}</emulator>{devices}</devices>"
        f"<qemu:commandline>{words}</qemu:commandline></domain>"
    )
