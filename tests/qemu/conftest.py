"""Fixtures for tests of guests. Tests that use `parts` or `payload_on_tcg` run once for each selected QEMU."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from pageferry.host import processes
from pageferry.host.compaction import compact_memory
from pageferry.host.registry import AnyEntry, Registry
from tests import hugetlb
from tests.conftest import CACHE
from tests.guest import payload
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial


@pytest.fixture(scope="session")
def parts(qemu: Path, guest_kernel: Path, checker_initrd: Path, states: Path) -> GuestParts:
    """Return the QEMU, kernel and initrd of a Linux guest, for each selected QEMU in turn."""
    return GuestParts(qemu, guest_kernel, checker_initrd, states=states)


@pytest.fixture(scope="session")
def payload_on_tcg(qemu: Path) -> GuestParts:
    """Return the parts of a guest without an operating system, on TCG, for each selected QEMU in turn.

    Such a guest boots within a second.
    """
    if shutil.which("rustc") is None:
        pytest.skip("no rustc, which builds the payload of the guest")
    return GuestParts(qemu, payload.build(CACHE / "guest/payload"))


@pytest.fixture(scope="session")
def newest_parts(request: pytest.FixtureRequest, guest_kernel: Path, checker_initrd: Path, states: Path) -> GuestParts:
    """Return the parts of a Linux guest for QEMU 10, or for the QEMU in PATH if QEMU 10 is missing.

    This fixture is for tests whose subject does not depend on the QEMU version.
    """
    try:
        newest: Path = request.getfixturevalue("qemu_10")
    except pytest.skip.Exception:
        newest = request.getfixturevalue("qemu_system")
    return GuestParts(newest, guest_kernel, checker_initrd, states=states)


@pytest.fixture
def serial(tmp_path: Path) -> Callable[[str], Serial]:
    """Return a function that creates serial lines by name."""
    return lambda name: Serial(tmp_path / f"{name}.serial")


@pytest.fixture
def registry() -> Iterator[Registry]:
    """Yield the registry of this test session. After the test, kill the workloads that the test has left.

    The test fails if it has left any workload.
    """
    registry = Registry()
    yield registry
    left = registry.entries()
    asyncio.run(_end(registry, left))
    assert list(left) == []


@pytest.fixture
def huge_pages(root: None) -> Iterator[None]:
    """Reserve 256 additional hugetlb pages of 2 MiB, enough for two guests of 256 MiB.

    Skip the test if the kernel cannot allocate these pages.
    """
    compact_memory(256)
    with hugetlb.reserved(256):
        yield


async def _end(registry: Registry, entries: Mapping[str, AnyEntry]) -> None:
    for name, entry in entries.items():
        processes.send_signal(entry.pid, entry.started, signal.SIGKILL)
        await processes.wait_for_end(entry.pid, entry.started)
        registry.remove(name)
