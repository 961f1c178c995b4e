"""What all tests share: a run directory of their own, and the things that guests are made of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.host.compaction import compact_memory
from tests.guest import initrd

CACHE = Path(__file__).parent.parent / ".cache"
"""Where `make system` puts what it fetches."""
ROOM = 96
"""Large pages that should be free for a test: what builds and caches leave is small pages all over."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its directory, so that `-m "not qemu"` selects."""
    for item in items:
        if (directory := item.path.parent.name) in ("kernel", "qemu", "faults", "use"):
            item.add_marker(directory)


@pytest.fixture(scope="session", autouse=True)
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A registry of workloads for this session, also for child processes: /run/pageferry is never touched."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGEFERRY_RUN_DIR", str(directory))
        yield directory


@pytest.fixture(autouse=True)
def room() -> None:
    """Memory is compacted first where large pages are few. No promise: the host may have no memory to spare."""
    compact_memory(ROOM)


@pytest.fixture(scope="session")
def guest_kernel() -> Path:
    """A Linux kernel image for guests."""
    return _fetched("guest/vmlinuz")


@pytest.fixture(scope="session")
def guest_modules() -> Path:
    """Directory with the virtio modules (`virtio_balloon.ko` and what it needs) of that kernel."""
    return _fetched("guest/modules")


@pytest.fixture(scope="session")
def qemu_system() -> Path:
    """The QEMU that the machine has in PATH."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        pytest.skip("no qemu-system-x86_64 in PATH (`make system` as root installs it)")
    return Path(found)


@pytest.fixture(scope="session")
def qemu_10() -> Path:
    """A newer QEMU than the machine's, from Debian backports."""
    return _fetched("qemu-10/bin/qemu-system-x86_64")


@pytest.fixture(scope="session", params=["system", "10"])
def qemu(request: pytest.FixtureRequest) -> Path:
    """Each QEMU in turn."""
    path: Path = request.getfixturevalue("qemu_system" if request.param == "system" else "qemu_10")
    return path


@pytest.fixture(scope="session")
def root() -> None:
    """For tests that need privileges."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def checker_initrd(guest_modules: Path) -> Path:
    """The initrd with the checker and the balloon's modules."""
    if shutil.which("rustc") is None:
        pytest.skip("no rustc to build the guest's checker with")
    modules = [guest_modules / f"{name}.ko" for name in initrd.BALLOON_MODULES]
    return initrd.build(guest_modules.parent / "checker", modules)


def _fetched(name: str) -> Path:
    path = CACHE / name
    if not path.exists():
        pytest.skip(f"{path} is missing (`make system` fetches it, on Debian for amd64)")
    return path
