"""Environment of a reader of the documentation: `pageferry` and `qemu-system-x86_64` in PATH, and two hosts."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CACHE
from tests.guest import payload
from tests.use.hosts import Host

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory, qemu_system: Path) -> Path:
    """Return a directory for PATH with `pageferry` and a QEMU that accepts the documentation's command line.

    This QEMU is a script that removes `...`, which stands for further options, and replaces KVM, which this host may
    lack, by TCG. The guest is the payload, which boots in a tenth of a second.
    """
    if shutil.which("rustc") is None:
        pytest.skip("no rustc, which builds the payload of the guest")
    folder = tmp_path_factory.mktemp("bin")
    (folder / "pageferry").symlink_to(Path(sys.executable).parent / "pageferry")
    machine = [
        *("-display", "none", "-nodefaults", "-kernel", str(payload.build(CACHE / "guest/payload"))),
        *("-append", "ferry.mib=16"),
    ]
    program = folder / "qemu-system-x86_64"
    program.write_text(
        "#!/bin/sh\n"
        "for word; do\n"
        "    shift\n"
        "    case $word in kvm) word=tcg ;; ...) continue ;; esac\n"
        '    set -- "$@" "$word"\n'
        "done\n"
        f'exec {shlex.quote(str(qemu_system))} "$@" {shlex.join(machine)}\n'
    )
    program.chmod(0o755)
    return folder


@pytest.fixture
def hosts(tmp_path: Path, programs: Path, root: None) -> Iterator[tuple[Host, Host]]:
    """Yield the local host and another host: two run directories, each with a working directory."""
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    pair = (Host(tmp_path / "here", path), Host(tmp_path / "there", path))
    try:
        yield pair
    finally:
        for host in pair:
            host.close()
