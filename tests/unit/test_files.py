"""Tests that files and links planted by another user are not opened, followed or written to."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import pageferry
from pageferry.cli.main import main
from pageferry.errors import ImageError, UsageError
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.images.working_set import WorkingSet
from tests.kernel.images import Maker

PACKAGE = Path(pageferry.__file__).parent
SECRET = b"root:$6$secret\n" * 1000
DEADLINE = 20
KERNEL_FILES = {
    "host/cgroups.py",
    "host/check.py",
    "host/compaction.py",
    "host/cpu_quota.py",
    "host/memory_file.py",
    "host/proc.py",
    "host/processes.py",
    "host/smaps.py",
    "large_pages/swap.py",
    "memory/mappers.py",
    "pager/base_records.py",
    "sharing/ksm.py",
    "stores/library.py",
    "workloads/direct_io.py",
    "workloads/handles.py",
    "workloads/process.py",
    "workloads/qemu/devices_only.py",
    "workloads/qemu/direct_io.py",
    "workloads/qemu/disks.py",
    "workloads/qemu/kvm_prefault.py",
}
"""Modules that open only kernel interfaces (/proc, /sys, pidfds) and unnamed files."""
OTHERS = {
    "cli/main.py": "/dev/null",
    "control/console.py": "a pseudo-terminal of QEMU",
    "control/logs.py": "a descriptor",
    "pager/process.py": "a descriptor",
    "large_pages/sampler.py": "/proc",
    "workloads/qemu/addresses.py": "sockets in the command line of QEMU",
    "workloads/qemu/disk_cache.py": "files and devices that QEMU has open",
    "workloads/qemu/disk_exports.py": "a socket in a private directory",
    "workloads/qemu/disk_files.py": "/proc, /sys, and the machine id",
    "stores/store.py": "directories, to sync them",
    "migration/transport/sockets.py": "sockets of the network",
    "host/endings.py": "a descriptor",
    "host/files.py": "all other files",
    "host/registry.py": "its own folders, to sync them",
    "migration/ownership.py": "a descriptor, its own folder, and a record in it",
    "report/page.py": "a file of the package",
    "workloads/arena/arena.py": "an unnamed file",
    "pager/client.py": "files in the private folder of a workload",
    "pager/records.py": "files in the private folder of a workload",
    "fleet/operations.py": "the output of an operation, in the private folder of the agent",
    "fleet/operation_process.py": "files in the private folder of the agent, /proc; it does not import the package",
    "host/guardian_process.py": "a record, without an import of the package",
    "workloads/qemu/process.py": "a descriptor, and the log in the private folder of a workload",
}
"""Other modules that open files, and the files that they open."""


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `pageferry` with a timeout, because opening a FIFO could block."""
    command = [sys.executable, "-I", "-m", "pageferry", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Return the path of a file that no command may open."""
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    return path


# -- reading of images


@pytest.mark.parametrize("verb", ["info", "verify"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket"])
def test_image_that_is_not_a_file_is_refused(tmp_path: Path, kind: str, verb: str) -> None:
    path = _special(tmp_path / "image", kind)
    done = run("image", verb, str(path), cwd=tmp_path)
    assert done.returncode == ImageError.exit_code
    assert "not a regular file" in done.stderr


def test_arena_from_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "image")
    program = f"import pageferry; pageferry.restore({str(tmp_path / 'image')!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    assert "it is a FIFO, and not a regular file" in done.stderr


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_parent_that_is_not_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    child = _child_of(tmp_path, tmp_path / "base")
    (tmp_path / "base").unlink()
    _special(tmp_path / "base", kind)
    done = run("image", "info", str(child), cwd=tmp_path)
    assert done.returncode == ImageError.exit_code
    assert "not a regular file" in done.stderr


def test_parent_in_another_folder_is_neither_opened_nor_shown(tmp_path: Path, secret: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    child = _child_of(elsewhere, tmp_path / "base")
    os.rename(secret, tmp_path / "base")
    opened = tmp_path / "base"
    before = opened.stat().st_atime_ns
    os.utime(opened, ns=(1, opened.stat().st_mtime_ns))
    with pytest.raises(ImageError, match="not in the same directory") as refused:
        ImageFile(child)
    assert before
    assert opened.stat().st_atime_ns == 1
    for part in ("$6$", SECRET[:8].hex(), "72, 6f"):
        assert part not in str(refused.value)


def test_contents_of_invalid_image_are_not_shown(secret: Path) -> None:
    with pytest.raises(ImageError) as refused:
        ImageFile(secret)
    assert "$6$" not in str(refused.value)
    assert "72, 6f" not in str(refused.value)


def test_parent_by_link_of_the_user_is_opened(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    child = _child_of(elsewhere, tmp_path / "base")
    (elsewhere / "base").symlink_to(tmp_path / "base")
    assert len(ImageFile(child).links) == 2


def test_parent_by_link_of_another_user_is_refused(tmp_path: Path, root: None) -> None:
    child = _child_of(tmp_path, tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "real")
    (tmp_path / "base").symlink_to("real")
    os.lchown(tmp_path / "base", 65534, 65534)
    with pytest.raises(ImageError, match="another user"):
        ImageFile(child)


@pytest.mark.parametrize("name", ["..", ".", "a\0b", "\x1b[2J"])
def test_parent_with_invalid_name_is_refused(tmp_path: Path, name: str) -> None:
    child = _child_of(tmp_path, Path(name), image=Maker(16).write(tmp_path / "base"))
    with pytest.raises(ImageError):
        ImageFile(child)


# -- writing of files


def test_working_set_does_not_write_through_a_planted_link(tmp_path: Path, secret: Path) -> None:
    working_set = WorkingSet(ImageFile(Maker(64).write(tmp_path / "image")))
    (tmp_path / f".image.ws.{os.getpid()}").symlink_to(secret)
    working_set.learn([1, 2], prefetched=False)
    assert secret.read_bytes() == SECRET


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_working_set_that_is_not_a_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = Maker(64).write(tmp_path / "image")
    _special(tmp_path / "image.ws", kind)
    program = (
        "from pageferry.images.image import ImageFile; from pageferry.images.working_set import WorkingSet;"
        f"print(WorkingSet(ImageFile({str(path)!r})).windows)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout == "[]\n", done.stderr


def test_report_does_not_write_through_a_planted_link(
    tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["image", "info", str(Maker(16).write(tmp_path / "image")), "--log", str(tmp_path / "log")]) == 0
    (tmp_path / f".page.html.{os.getpid()}").symlink_to(secret)
    assert main(["report", str(tmp_path / "log"), "--html", str(tmp_path / "page.html")]) == 0
    assert secret.read_bytes() == SECRET
    assert (tmp_path / "page.html").stat().st_size > 1000


@pytest.mark.parametrize("name", ["log", "report"])
def test_fifo_as_a_log_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    words = ["list", "--log", str(tmp_path / "fifo")] if name == "log" else ["report", str(tmp_path / "fifo")]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == UsageError.exit_code
    assert "FIFO" in done.stderr


def test_log_that_replaces_a_readable_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old")
    path.chmod(0o644)
    with open(path) as reader:  # opened while all users may read the file
        assert main(["list", "--log", str(path)]) == 0
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.read_text().startswith('{"at-ms"')
        assert reader.read() == "old"


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_log_does_not_write_through_a_planted_link(tmp_path: Path, secret: Path, link: str) -> None:
    path = tmp_path / "log"
    if link == "symbolic":
        path.symlink_to(secret)
    else:
        path.hardlink_to(secret)
    assert main(["list", "--log", str(path)]) == (UsageError.exit_code if link == "symbolic" else 0)
    assert secret.read_bytes() == SECRET


def test_log_in_place_of_another_users_file_is_refused(tmp_path: Path, root: None) -> None:
    (tmp_path / "log").write_text("theirs")
    os.chown(tmp_path / "log", 65534, 65534)
    assert main(["list", "--log", str(tmp_path / "log")]) == UsageError.exit_code
    assert (tmp_path / "log").read_text() == "theirs"


# -- run directory


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_run_directory_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    registry = Registry(tmp_path / "run")
    for use in (lambda: registry.claim("web"), lambda: registry.lookup("web"), registry.entries):
        with pytest.raises(UsageError, match="other users can write"):
            use()


def test_run_directory_of_another_user_is_refused(tmp_path: Path, root: None) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    os.chown(tmp_path / "run", 65534, 65534)
    registry = Registry(tmp_path / "run")
    for use in (lambda: registry.claim("web"), lambda: registry.lookup("web"), registry.entries):
        with pytest.raises(UsageError, match="belongs to user 65534"):
            use()


def test_record_replaces_a_planted_link(tmp_path: Path, secret: Path) -> None:
    folder = Registry(tmp_path / "run").claim("web")

    class Record(msgspec.Struct):
        value: int

    (folder.path / f".record.{os.getpid()}").symlink_to(secret)
    (folder.path / "record").symlink_to(secret)
    folder.store("record", Record(1))
    assert folder.load("record", Record) == Record(1)
    assert secret.read_bytes() == SECRET


# -- modules that open files


def test_every_file_is_opened_by_one_module() -> None:
    """A module that opens files without host/files.py must be listed in KERNEL_FILES or OTHERS."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith("host/probes/"):
            found |= {name for node in ast.walk(ast.parse(path.read_text())) if _opens(node)}
    assert found - KERNEL_FILES - set(OTHERS) == set()


def _opens(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    methods = (".read_text", ".read_bytes", ".write_text", ".write_bytes", ".touch", ".bind")
    return called in ("open", "os.open", "io.open", "tempfile.mkstemp") or called.endswith(methods)


def _special(path: Path, kind: str) -> Path:
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            if os.geteuid() != 0:
                pytest.skip("creating a device node requires root")
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        case "folder":
            path.mkdir()
        case "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
    return path


def _child_of(folder: Path, parent: Path, image: Path | None = None) -> Path:
    """Write an image to `folder` that records `parent` as the path of its parent. Return the path of the image.

    The parent is the existing image `image`, or a new image at `parent`.
    """
    made: Any = Maker(16)
    if image is None:
        made.write(parent)
    child = Maker(16, parent=image or parent)
    if image is not None:
        from tests.kernel import images

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images, "Parent", lambda **fields: _parent(**(fields | {"path": str(parent)})))
            return child.write(folder / "child")
    return child.write(folder / "child")


def _parent(**fields: Any) -> Any:
    from pageferry.images.metadata import Parent

    return Parent(**fields)
