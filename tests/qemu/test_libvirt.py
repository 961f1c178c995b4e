"""Adoption of domains of a real libvirt, which runs QEMU as another user and with QEMU's seccomp filter."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pageferry
from pageferry.errors import NoSuchWorkload, UnsupportedError, UsageError, WorkloadError
from pageferry.host.registry import QemuEntry, Registry
from pageferry.memory import mappers
from pageferry.workloads.qemu.command_line import parse
from pageferry.workloads.qemu.guest import QemuWorkload
from pageferry.workloads.qemu.option_syntax import options
from tests.conftest import CACHE
from tests.guest import libvirt, payload
from tests.guest.libvirt import Libvirt, domain
from tests.guest.serial import Serial

pytestmark = pytest.mark.timeout(300)  # the daemon examines QEMU before its first domain

SHARED = "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>"


class Guest:
    """Domain that runs the payload."""

    def __init__(self, daemon: Libvirt, emulator: Path, name: str) -> None:
        self.daemon, self.emulator, self.name = daemon, emulator, name
        self.serial = Serial(daemon.folder / f"{name}.serial")
        kernel = daemon.readable(payload.build(CACHE / "guest/payload"))
        self.system = (
            "<os><type arch='x86_64' machine='pc'>hvm</type>"
            f"<kernel>{kernel}</kernel><cmdline>ferry.mib=16</cmdline></os>"
        )
        self.socket = ("-qmp", f"unix:{daemon.sockets}/{name}.sock,server=on,wait=off")

    def start(self, *options: str, memory: str = "") -> None:
        """Start the domain, with these additional options of QEMU."""
        serial = f"<serial type='file'><source path='{self.serial.path}'/></serial>"
        xml = domain(self.name, self.emulator, memory=memory + self.system, devices=serial, options=options)
        self.daemon.create(xml)

    def adopt(self) -> None:
        """Adopt the domain under its own name."""
        pageferry.adopt(libvirt=self.name, connect=self.daemon.uri)

    def huge(self) -> tuple[str, ...]:
        """Return the options for memory in huge pages: another backend, at an aligned address."""
        backend = f"memory-backend-file,id=ram0,size=128M,share=on,align=2M,mem-path={self.daemon.memory}"
        return ("-object", backend, "-machine", "memory-backend=ram0")


@pytest.fixture
def guest(
    libvirt_daemon: Libvirt, qemu_system: Path, registry: Registry, request: pytest.FixtureRequest
) -> Iterator[Guest]:
    """Yield a domain that is not started yet, and that has a distinct name."""
    name = f"web{abs(hash(request.node.name)) % 10**6}"
    yield Guest(libvirt_daemon, qemu_system, name)
    libvirt_daemon.run("destroy", name)
    registry.entries()  # removes the entry of the guest


def pageferry_command(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "pageferry", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=libvirt.TIMEOUT, check=False)


def command_line(pid: int) -> list[str]:
    """Return the command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")


def outside(words: list[str], serial: Serial) -> list[str]:
    """Return the command line of a domain for a QEMU that libvirt does not manage: without the options that refer to
    libvirt, and without the backend that the domain does not use."""
    result = [words[0]]
    for name, value in options(words):
        if name in ("S", "qmp", "mon", "add-fd") or re.search("charmonitor|masterKey0|memory-backend-ram", value):
            continue
        if name == "chardev":
            value = f"file,id=charserial0,path={serial.path}"
        result += [f"-{name}", value] if value else [f"-{name}"]
    return result


@pytest.mark.parametrize("kind", ["file", "memfd", "aligned"])
def test_domain_is_adopted_with_the_memory_that_it_uses(guest: Guest, registry: Registry, kind: str) -> None:
    huge = kind == "aligned"
    guest.start(*guest.socket, *(guest.huge() if huge else ()), memory="" if huge else SHARED.replace("file", kind))
    done = pageferry_command("adopt", "--libvirt", guest.name, "--connect", guest.daemon.uri)
    assert done.returncode == 0, done.stderr
    entry = registry.lookup(guest.name)
    assert isinstance(entry, QemuEntry)
    assert (entry.adopted, entry.domain) == (True, guest.name)
    (info,) = [json.loads(line) for line in pageferry_command("list", "--output", "json").stdout.splitlines()]
    assert (info["name"], info["status"], info["memory"]) == (guest.name, "running", 128 << 20)
    if huge:
        assert "align=2M" not in done.stderr
    else:
        assert "pc.ram: huge pages are disabled" in done.stderr


@pytest.mark.usefixtures("kernel_faults")
def test_domain_under_load_is_saved_and_restored_outside_of_libvirt(
    guest: Guest, registry: Registry, tmp_path: Path
) -> None:
    guest.start(*guest.socket, *guest.huge())
    guest.adopt()
    assert guest.daemon.state(guest.name) == "running (booted)"
    asyncio.run(guest.serial.passes(2))
    saved = pageferry_command("checkpoint", guest.name, str(tmp_path / "first.img"))
    assert saved.returncode == 0, saved.stderr
    asyncio.run(guest.serial.passes(2))
    assert guest.daemon.state(guest.name) == "running (unpaused)"
    saved = pageferry_command(
        "checkpoint", guest.name, str(tmp_path / "second.img"), "--parent", str(tmp_path / "first.img")
    )
    assert saved.returncode == 0, saved.stderr
    asyncio.run(guest.serial.passes(2))
    words = command_line(registry.lookup(guest.name).pid)
    assert guest.daemon.run("destroy", guest.name).returncode == 0
    serial = Serial(tmp_path / "serial")
    restored = pageferry_command(
        "restore", "again", str(tmp_path / "second.img"), "--detach", "--", *outside(words, serial)
    )
    assert restored.returncode == 0, restored.stderr
    asyncio.run(serial.passes(2))
    assert pageferry_command("stop", "again").returncode == 0


def test_libvirt_reports_a_pause_and_the_end_of_an_adopted_domain(guest: Guest) -> None:
    guest.start(*guest.socket, memory=SHARED)
    guest.adopt()
    pageferry.pause(guest.name)
    assert guest.daemon.state(guest.name).startswith("paused")
    pageferry.resume(guest.name)
    assert guest.daemon.state(guest.name) == "running (unpaused)"
    assert guest.daemon.run("suspend", guest.name).returncode == 0
    assert pageferry.resume(guest.name).changed
    assert guest.daemon.state(guest.name) == "running (unpaused)"
    pageferry.stop(guest.name)
    deadline = time.monotonic() + libvirt.TIMEOUT
    while guest.name in guest.daemon.run("list", "--all", "--name").stdout.split():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_migration_of_a_domain_is_refused_by_name(guest: Guest, tmp_path: Path) -> None:
    guest.start(*guest.socket, memory=SHARED)
    pageferry.adopt("mine", qmp=f"{guest.daemon.sockets}/{guest.name}.sock")  # recognised without --libvirt, too
    done = pageferry_command("migrate", "mine", f"unix:{tmp_path}/receiver")
    assert done.returncode == UnsupportedError.exit_code
    assert f"cannot migrate mine: libvirt manages it as domain {guest.name}" in done.stderr
    assert guest.daemon.state(guest.name) == "running (booted)"


@pytest.mark.parametrize(
    ("options", "memory", "message"),
    [
        (False, SHARED, "no QMP socket besides libvirt's.*<qemu:arg value='-qmp'/>"),
        (True, "", "guest memory in backend pc.ram: it is private.*memoryBacking"),
    ],
    ids=["monitor", "memory"],
)
def test_domain_that_cannot_be_adopted_is_refused_with_the_xml_to_add(
    guest: Guest, registry: Registry, options: bool, memory: str, message: str
) -> None:
    guest.start(*(guest.socket if options else ()), memory=memory)
    with pytest.raises(UnsupportedError, match=message):
        guest.adopt()
    assert guest.name not in registry.entries()


def test_unknown_and_inactive_domains_are_refused(guest: Guest) -> None:
    with pytest.raises(NoSuchWorkload, match=f"no domain {guest.name} in libvirt"):
        guest.adopt()
    xml = guest.daemon.folder / "inactive.xml"
    xml.write_text(domain(guest.name, guest.emulator, memory=guest.system))
    assert guest.daemon.run("define", str(xml)).returncode == 0
    try:
        with pytest.raises(WorkloadError, match=f"{guest.name}: it is not running; start it with `virsh start"):
            guest.adopt()
    finally:
        guest.daemon.run("undefine", guest.name)
    with pytest.raises(WorkloadError, match=r"cannot query libvirt .* check its daemon"):
        pageferry.adopt(libvirt=guest.name, connect="qemu+unix:///system?socket=/nowhere")


def test_socket_of_another_domain_is_refused(guest: Guest) -> None:
    """The path in the XML of a domain leads to the socket of another one."""
    guest.start(*guest.socket, memory=SHARED)
    daemon = guest.daemon
    other = Guest(daemon, guest.emulator, f"{guest.name}x")
    other.start(*other.socket, memory=SHARED)
    path = Path(f"{daemon.sockets}/{other.name}.sock")
    path.unlink()
    path.symlink_to(f"{daemon.sockets}/{guest.name}.sock")
    try:
        with pytest.raises(WorkloadError, match=f"cannot adopt domain {other.name}: .* belongs to the guest"):
            other.adopt()
    finally:
        daemon.run("destroy", other.name)


def test_command_line_of_libvirt_is_parsed(guest: Guest, registry: Registry) -> None:
    guest.start(*guest.socket, memory=SHARED)
    guest.adopt()
    parsed = parse(command_line(registry.lookup(guest.name).pid))
    assert (parsed.ram_size, parsed.needs_ram_file) == (128 << 20, False)
    (file,) = parsed.ram_files
    assert file.path.startswith(str(guest.daemon.memory))
    assert file.size == 128 << 20
    # A second guest with the same command line would use the memory and the sockets of the running guest.
    with pytest.raises(WorkloadError, match=f"process .* maps {file.path} for writing"):
        mappers.refuse_in_use("copy", *file)
    with pytest.raises(WorkloadError, match=f"unix:{guest.daemon.sockets}.* is in use"):
        asyncio.run(QemuWorkload.start("copy", command_line(registry.lookup(guest.name).pid)))
    assert guest.daemon.state(guest.name) == "running (booted)"


def test_adopt_checks_its_options_first() -> None:
    with pytest.raises(UsageError, match="either `qmp`"):
        pageferry.adopt("web")
    with pytest.raises(UsageError, match="either `qmp`"):
        pageferry.adopt("web", qmp="/x", libvirt="web")
    with pytest.raises(UsageError, match="`connect` applies to `libvirt` only"):
        pageferry.adopt("web", qmp="/x", connect="qemu:///system")
    with pytest.raises(UsageError, match="cannot adopt a guest without a name"):
        pageferry.adopt(qmp="/x")
