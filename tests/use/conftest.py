"""What somebody who follows the documentation has: `pageferry` and `qemu-system-x86_64` in PATH, two hosts."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.use.hosts import Host

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def programs(
    tmp_path_factory: pytest.TempPathFactory, qemu_system: Path, guest_kernel: Path, checker_initrd: Path
) -> Path:
    """A directory for PATH: our command, and a QEMU that takes the documentation's command line.

    That leaves out what everybody has to say for himself (`...`) and asks for KVM, which may not be here.
    """
    folder = tmp_path_factory.mktemp("bin")
    (folder / "pageferry").symlink_to(Path(sys.executable).parent / "pageferry")
    machine = [
        *("-display", "none", "-nodefaults", "-kernel", str(guest_kernel), "-initrd", str(checker_initrd)),
        *("-append", "console=ttyS0 quiet ferry.mib=64"),
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
    """This host and another one: two run directories, and one working directory each."""
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    pair = (Host(tmp_path / "here", path), Host(tmp_path / "there", path))
    try:
        yield pair
    finally:
        for host in pair:
            host.close()
