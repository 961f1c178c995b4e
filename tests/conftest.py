"""Shared fixtures: a separate run directory, and the programs and files of test guests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from pageferry.host.compaction import compact_memory
from pageferry.host.proc import meminfo
from tests.guest import initrd, libvirt, payload
from tests.guest.libvirt import Libvirt
from tests.guest.machines import GuestParts

FULL = os.environ.get("GUESTS") == "all"
"""Whether this run uses all QEMUs, all accelerators and all repetitions (`make test-full`)."""
CACHE = Path(__file__).parent.parent / ".cache"
"""Folder with the programs and files that `make system` downloads."""
QEMUS = ["system", "10", "11"]
"""QEMUs for guests, from oldest to newest. `system` is the one in PATH."""
ROOM = 96
"""Target number of free huge pages before a test. They become scarce, because builds and the page cache fragment
memory."""
MIN_FREE = 2 << 30
"""Minimum free memory before a test, bytes. Compaction needs free pages, which builds turn into page cache."""
UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")
"""Whether processes without privileges can handle page faults in system calls."""
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
ORDER = """
    test_benchmarks test_migration_hosts test_copied_disks test_disks_saved test_disks test_restore test_commands
    test_direct_io test_paused test_control test_migrate_failures test_migrate_arena qemu faults use kernel
""".split()
"""Files and directories with the slowest tests, slowest first. One process runs all tests of a file, so a slow file
that starts late would run alone at the end."""
CHANGES_MACHINE = {"device", "huge_pages", "kernel_faults", "ksm_usable", "swap", "switches"}
"""Fixtures that change machine-wide settings, such as those of KSM, huge pages, swap and /dev/userfaultfd."""

# Tests start thousands of Python programs. Without cached byte code, each program would compile the whole package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A background process of a shell ignores SIGINT, and so do its children. Tests send this signal.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Examples have no deadline, and may be generated slowly: tests do not depend on the speed of the machine.
hypothesis.settings.register_profile(
    "pageferry", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("pageferry")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with the name of its directory (for `-m "not qemu"`), and sort slow files and directories first.

    Tests that change machine-wide settings are marked `alone`. Tests marked `only_full` are deselected without
    GUESTS=all.
    """
    if not FULL:
        long = [item for item in items if item.get_closest_marker("only_full") is not None]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
    for item in items:
        if (directory := item.path.parent.name) in ("kernel", "qemu", "faults", "use"):
            item.add_marker(directory)
        if CHANGES_MACHINE & set(getattr(item, "fixturenames", ())) or "hugetlb" in item.name:
            item.add_marker("alone")
    items.sort(key=_rank)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append the duration of each phase of a test to the file that the environment variable TEST_DURATIONS names.

    `make test` prints the slowest 20 entries of this file, and the sums of the slowest 20 files.
    """
    if (path := os.environ.get("TEST_DURATIONS")) is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as file:
            file.write(f"{report.duration:8.2f} {report.when:8} {report.nodeid}\n")


def _rank(item: pytest.Item) -> int:
    """Return the index of a test's file or directory in `ORDER`; `len(ORDER)` if neither is listed."""
    return next((ORDER.index(name) for name in (item.path.stem, item.path.parent.name) if name in ORDER), len(ORDER))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Select the QEMUs and accelerators of a test.

    GUESTS=all selects all QEMUs and accelerators. Otherwise, a subset keeps the run short: tests of guests run with
    QEMU 10, tests of the payload on KVM with the two newest QEMUs. Tests whose subject differs between versions of QEMU
    are marked `oldest_qemu`, to run also with the oldest QEMU, or `every_qemu`, to run with all QEMUs.
    """
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    every = FULL or "every_qemu" in marks
    if "qemu" in metafunc.fixturenames:
        chosen = QEMUS if every else QEMUS[:2] if "oldest_qemu" in marks else [_usual_qemu()]
        metafunc.parametrize("qemu", chosen, indirect=True, scope="session")
    if "real_qemu" in metafunc.fixturenames:
        chosen = QEMUS if FULL else QEMUS[1:2]
        metafunc.parametrize("real_qemu", chosen, indirect=True, scope="session")
    if "payload_parts" in metafunc.fixturenames:
        accels = ["tcg", "kvm"] if FULL else ["kvm"]
        kinds = [(accel, qemu) for accel in accels for qemu in (QEMUS if every else QEMUS[1:])]
        names = ["-".join(kind) for kind in kinds]
        metafunc.parametrize("payload_parts", kinds, ids=names, indirect=True, scope="session")


def _usual_qemu() -> str:
    """Return the name of QEMU 10, or of the QEMU in PATH if QEMU 10 has not been fetched."""
    return "10" if (CACHE / "qemu-10").exists() else "system"


@pytest.fixture(scope="session", autouse=True)
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Use a separate run directory for this session and its child processes, so that /run/pageferry is not touched."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGEFERRY_RUN_DIR", str(directory))
        patch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield directory


@pytest.fixture(autouse=True)
def room() -> None:
    """Make huge pages available: drop the page cache if less than `MIN_FREE` bytes are free, and compact memory.

    Both require root.
    """
    if meminfo()["MemFree"] < MIN_FREE:
        with contextlib.suppress(OSError):
            DROP_CACHES.write_text("1")
    compact_memory(ROOM)


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for the saved states of booted guests. All processes of this test run share the folder."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "states"


@pytest.fixture(scope="session")
def guest_kernel() -> Path:
    """Return the path of a Linux kernel image for guests."""
    return _fetched("guest/vmlinuz")


@pytest.fixture(scope="session")
def generic_kernel() -> Path:
    """Return the path of a Linux kernel image with a driver for vmgenid."""
    return _fetched("debian/vmlinuz")


@pytest.fixture(scope="session")
def identity_modules() -> Path:
    """Return the folder with the modules of `generic_kernel` for fw_cfg and CD-ROM drives."""
    return _fetched("debian/identity")


@pytest.fixture(scope="session")
def guest_modules() -> Path:
    """Return the folder with the virtio modules (`virtio_balloon.ko` and its dependencies) of `guest_kernel`."""
    return _fetched("guest/modules")


@pytest.fixture(scope="session")
def qemu_system() -> Path:
    """Return the path of the QEMU in PATH; skip the test if there is none."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        pytest.skip("no qemu-system-x86_64 in PATH (`make system` as root installs it)")
    return Path(found)


@pytest.fixture(scope="session")
def qemu_10() -> Path:
    """Return the path of QEMU 10, from Debian backports."""
    return _fetched("qemu-10/bin/qemu-system-x86_64")


@pytest.fixture(scope="session")
def qemu_11() -> Path:
    """Return the path of QEMU 11, from a later Debian release. It uses the loader and libraries of that release."""
    return _fetched("qemu-11/bin/qemu-system-x86_64")


@pytest.fixture(scope="session")
def qemu(request: pytest.FixtureRequest) -> Path:
    """Return the path of the selected QEMU; see `pytest_generate_tests`."""
    path: Path = request.getfixturevalue(f"qemu_{request.param}")
    return path


@pytest.fixture(scope="session")
def real_qemu(request: pytest.FixtureRequest) -> Path:
    """Return the path of the selected QEMU for guests with real programs; see `pytest_generate_tests`."""
    path: Path = request.getfixturevalue(f"qemu_{request.param}")
    return path


@pytest.fixture(scope="session")
def payload_parts(request: pytest.FixtureRequest) -> GuestParts:
    """Return the parts of a guest without an operating system, for the selected accelerator and QEMU.

    See `pytest_generate_tests`.
    """
    accel, version = request.param
    if (reason := payload.obstacle(accel)) is not None:
        pytest.skip(reason)
    if shutil.which("rustc") is None:
        pytest.skip("no rustc, which builds the payload of the guest")
    qemu: Path = request.getfixturevalue(f"qemu_{version}")
    return GuestParts(qemu, payload.build(CACHE / "guest/payload"), accel=accel)


@pytest.fixture(scope="module")
def libvirt_daemon(qemu_system: Path) -> Iterator[Libvirt]:
    """Yield a private libvirt daemon."""
    libvirt.require()
    with Libvirt() as running:
        yield running


@pytest.fixture
def kernel_faults() -> Iterator[None]:
    """Allow all users to handle page faults in system calls, as docs/guide/libvirt.md requires."""
    before = UNPRIVILEGED.read_text()
    UNPRIVILEGED.write_text("1")
    try:
        yield
    finally:
        UNPRIVILEGED.write_text(before)


@pytest.fixture(scope="session")
def root() -> None:
    """Skip the test unless it runs as root."""
    if os.geteuid() != 0:
        pytest.skip("requires root")


@pytest.fixture(scope="session")
def checker_initrd(guest_modules: Path) -> Path:
    """Return the initrd with the checker and the balloon modules."""
    if shutil.which("rustc") is None:
        pytest.skip("no rustc, which builds the checker of the guest")
    modules = [guest_modules / f"{name}.ko" for name in initrd.BALLOON_MODULES]
    return initrd.build(guest_modules.parent / "checker", modules)


def _fetched(name: str) -> Path:
    path = CACHE / name
    if not path.exists():
        pytest.skip(f"{path} is missing (`make system` fetches it, on Debian for amd64)")
    return path
