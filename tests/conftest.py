"""What all tests share: a run directory of their own, and the things that guests are made of."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.host.compaction import compact_memory
from tests.guest import initrd, payload
from tests.guest.machines import GuestParts

CACHE = Path(__file__).parent.parent / ".cache"
"""Where `make system` puts what it fetches."""
QEMUS = ["system", "10", "11"]
"""From the oldest to the newest."""
ROOM = 96
"""Large pages that should be free for a test: what builds and caches leave is small pages all over."""
ORDER = ["qemu", "faults", "kernel"]
"""Directories whose tests take longest, the longest first."""
CHANGES_MACHINE = {"device", "huge_pages", "ksm_usable", "switches"}
"""Fixtures that change settings of the machine: of KSM, of huge pages, of /dev/userfaultfd."""
LOCK = Path(tempfile.gettempdir()) / "pageferry-tests.lock"
"""Held by every test of every run on this machine."""

# Tests start thousands of programs. Each would compile the whole package again where the environment forbids byte code.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its directory, so that `-m "not qemu"` selects, and put the long ones first.

    Tests that change settings of the machine run alone.
    """
    for item in items:
        if (directory := item.path.parent.name) in ("kernel", "qemu", "faults", "use"):
            item.add_marker(directory)
        if CHANGES_MACHINE & set(getattr(item, "fixturenames", ())) or "hugetlb" in item.name:
            item.add_marker("alone")
    items.sort(key=lambda item: ORDER.index(item.path.parent.name) if item.path.parent.name in ORDER else len(ORDER))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hold the machine for a test: together with others, or alone. The wait does not count as time of the test."""
    how = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    with open(f"{LOCK}.next", "ab") as next_turn, open(LOCK, "ab") as machine:
        fcntl.flock(next_turn, fcntl.LOCK_EX)  # or tests that run together would keep one out that runs alone
        fcntl.flock(machine, how)
        fcntl.flock(next_turn, fcntl.LOCK_UN)
        return (yield)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the QEMUs and accelerators of a test: all with GUESTS=all, or a part, so that a run stays short.

    Tests of guests run with the two oldest QEMUs, with the newest too if they are marked `every_qemu`. Tests of the
    payload run on KVM with the two newest, with all QEMUs if marked.
    """
    every = os.environ.get("GUESTS") == "all" or metafunc.definition.get_closest_marker("every_qemu") is not None
    if "qemu" in metafunc.fixturenames:
        metafunc.parametrize("qemu", QEMUS if every else QEMUS[:2], indirect=True, scope="session")
    if "payload_parts" in metafunc.fixturenames:
        accels = ["tcg", "kvm"] if os.environ.get("GUESTS") == "all" else ["kvm"]
        kinds = [(accel, qemu) for accel in accels for qemu in (QEMUS if every else QEMUS[1:])]
        names = ["-".join(kind) for kind in kinds]
        metafunc.parametrize("payload_parts", kinds, ids=names, indirect=True, scope="session")


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


@pytest.fixture(scope="session")
def qemu_11() -> Path:
    """A QEMU of a later Debian release, with the loader and libraries of that release."""
    return _fetched("qemu-11/bin/qemu-system-x86_64")


@pytest.fixture(scope="session")
def qemu(request: pytest.FixtureRequest) -> Path:
    """Each QEMU in turn; see `pytest_generate_tests`."""
    path: Path = request.getfixturevalue(f"qemu_{request.param}")
    return path


@pytest.fixture(scope="session")
def payload_parts(request: pytest.FixtureRequest) -> GuestParts:
    """A guest without an operating system, for each accelerator and QEMU in turn; see `pytest_generate_tests`."""
    accel, version = request.param
    if (reason := payload.obstacle(accel)) is not None:
        pytest.skip(reason)
    if shutil.which("rustc") is None:
        pytest.skip("no rustc to build the guest with")
    qemu: Path = request.getfixturevalue(f"qemu_{version}")
    return GuestParts(qemu, payload.build(CACHE / "guest/payload"), accel=accel)


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
