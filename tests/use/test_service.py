"""Tests of the systemd units and of the line for /etc/fstab: they are valid, and their user and privileges suffice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.machines import GuestParts
from tests.kernel import users
from tests.kernel.moving import environment

ROOT = Path(__file__).parent.parent.parent
UNITS = sorted((ROOT / "packaging/data/share/pageferry/systemd").glob("*.service"))
CAPABILITIES = {"CAP_SYS_PTRACE", "CAP_SYS_NICE", "CAP_SYS_ADMIN"}


def settings(unit: Path) -> dict[str, str]:
    """Return the settings of a unit. No setting occurs twice."""
    return dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line)


def fstab() -> str:
    """Return the line for /etc/fstab in the documentation."""
    (line,) = re.findall(r"^    (tmpfs  .*)$", (ROOT / "docs/hosts.md").read_text(), re.MULTILINE)
    return str(line)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a directory that every user may write to."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o777)
        yield Path(made)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze (Debian: apt-get install systemd)")
    program = Path(sys.executable).parent / "pageferry"
    instance = tmp_path / unit.name.replace("@", "@web")
    instance.write_text(unit.read_text().replace("/usr/local/bin/pageferry", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", instance], capture_output=True, text=True, timeout=60, check=False
    )
    assert instance.name not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_unit_has_the_documented_privileges(unit: Path) -> None:
    found = settings(unit)
    assert set(found["AmbientCapabilities"].split()) == CAPABILITIES
    assert found["User"] == "pageferry"
    assert f"/run/{found['RuntimeDirectory']}" == found["Environment"].removeprefix("PAGEFERRY_RUN_DIR=")


def as_service(folder: Path, *arguments: str, capabilities: set[str] = CAPABILITIES) -> str:
    """Run pageferry as an ordinary user with these ambient capabilities, and return its output."""
    words = ",".join(f"+{one.removeprefix('CAP_').lower()}" for one in sorted(capabilities))
    identity = ["--reuid", str(users.UID), "--regid", str(users.UID), "--clear-groups"]
    path = [str(ROOT), *(one for one in sys.path if "site-packages" in one), str(ROOT / "src")]
    command = ["setpriv", *identity, "--inh-caps", words, "--ambient-caps", words, users.python(), "-m", "pageferry"]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env={**environment(None), "PAGEFERRY_RUN_DIR": str(folder / "run"), "PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr
    assert "base pages" not in done.stderr
    return done.stdout


@pytest.mark.usefixtures("root")
def test_user_of_the_service_runs_saves_and_restores_guests(qemu_system: Path, folder: Path) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv (Debian: apt-get install util-linux)")
    command = GuestParts(qemu_system, Path()).bare("-m", "64M", "-device", "vmgenid,guid=auto")
    command[command.index("-sandbox") + 1] = "off"
    as_service(folder, "run", "web", "--detach", "--", *command)
    try:
        as_service(folder, "checkpoint", "web", "web.img")
        as_service(folder, "restore", "web2", "web.img", "--detach", "--", *command)
        assert re.search(r"\bweb2 .*running", as_service(folder, "list"))
    finally:
        for name in ("web", "web2"):
            as_service(folder, "shutdown", name, "--timeout", "1s", "--force")


@pytest.mark.usefixtures("root")
def test_guest_with_memory_on_the_mounted_file_system_needs_fewer_privileges(qemu_system: Path, folder: Path) -> None:
    if shutil.which("setpriv") is None or shutil.which("findmnt") is None:
        pytest.skip("no setpriv or no findmnt (Debian: apt-get install util-linux mount)")
    mounted = folder / "guests"
    mounted.mkdir()
    line = fstab().replace("/srv/guests", str(mounted)).replace("uid=pageferry", f"uid={users.UID}")
    table = folder / "fstab"
    table.write_text(line + "\n")
    checked = subprocess.run(["findmnt", "--verify", "--tab-file", table], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    subprocess.run(["mount", "--fstab", table, mounted], check=True)
    try:
        backend = f"memory-backend-file,id=ram0,size=64M,share=on,align=2M,mem-path={mounted}"
        command = GuestParts(qemu_system, Path()).bare(
            "-m", "64M", "-machine", "memory-backend=ram0", "-object", backend
        )
        command[command.index("-sandbox") + 1] = "off"
        few = CAPABILITIES - {"CAP_SYS_ADMIN"}
        as_service(folder, "run", "web", "--detach", "--", *command, capabilities=few)
        try:
            as_service(folder, "checkpoint", "web", "web.img", capabilities=few)
        finally:
            as_service(folder, "shutdown", "web", "--timeout", "1s", "--force", capabilities=few)
    finally:
        subprocess.run(["umount", mounted], check=True)
