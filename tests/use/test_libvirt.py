"""Test of the guide for libvirt: its domain and its commands, in their order, with a private libvirt daemon."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.libvirt import Libvirt
from tests.use.hosts import ROOT, Host

PAGE = ROOT / "docs/guide/libvirt.md"
PREPARED = ("mount ", "install ", "sysctl ")
"""Commands that prepare the host, as the fixture does."""


@pytest.fixture
def host(tmp_path: Path, libvirt_daemon: Libvirt, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", libvirt_daemon.uri)
    path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    host = Host(tmp_path / "host", path)
    yield host
    host.close()


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("kernel_faults")
def test_guide_can_be_followed(host: Host, libvirt_daemon: Libvirt) -> None:
    page = PAGE.read_text()
    for there, here in (
        ("/srv/guests", str(libvirt_daemon.memory)),
        ("/run/guests", str(libvirt_daemon.sockets)),
        ("type='kvm'", "type='qemu'"),
        ("-accel kvm", "-accel tcg"),
    ):
        assert there in page
        page = page.replace(there, here)
    (xml,) = re.findall(r"^```xml\n(<domain.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (host.work / "web.xml").write_text(xml)
    commands = re.findall(r"^\$ (.*)$", page, re.MULTILINE)
    assert len(commands) > 10
    for command in commands:
        if not command.startswith(PREPARED):
            done = host.run(command)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if command.startswith("pageferry adopt"):
            assert "huge pages are disabled" not in done.stderr
