"""Tests that workloads implement the protocols `Migratable`, `Live` and `Saveable`.

mypy checks the methods by means of `_migratable`, `_live` and `_saveable`; the tests check the attributes.
"""

import os
import subprocess
from collections.abc import Iterator

import pytest

from pageferry import Arena, errors
from pageferry.demo.ledger import LedgerWorkload
from pageferry.workloads.arena.control_socket.client import RemoteArena
from pageferry.workloads.cloud_hypervisor.vm import CloudHypervisorVm
from pageferry.workloads.lifecycle import LocalWorkload
from pageferry.workloads.managed import managed, saveable
from pageferry.workloads.process import ProcessWorkload
from pageferry.workloads.protocols import Live, Migratable, Saveable
from pageferry.workloads.qemu.guest import QemuWorkload


def _migratable(one: QemuWorkload | LocalWorkload | RemoteArena | LedgerWorkload) -> Migratable:
    return one


def _live(one: CloudHypervisorVm) -> Live:
    return one


def _saveable(one: ProcessWorkload) -> Saveable:
    return one


@pytest.fixture
def process() -> Iterator[ProcessWorkload]:
    child = subprocess.Popen(["sleep", "60"])
    workload = ProcessWorkload(child.pid, "stack")
    yield workload
    workload.close()
    child.kill()
    child.wait()


def test_process_can_be_saved_but_not_migrated(process: ProcessWorkload) -> None:
    assert isinstance(_saveable(process), Saveable)
    assert not isinstance(process, Migratable)
    assert saveable(process) is process
    with pytest.raises(errors.UnsupportedError, match=r"is a process, not a managed workload"):
        managed(process)


def test_arena_of_this_process_is_migratable() -> None:
    with Arena(4096) as arena:
        workload = _migratable(arena.workload())
        assert isinstance(workload, Migratable)
        assert workload.live is workload
        assert workload.pid == os.getpid()
        assert managed(workload) is workload
