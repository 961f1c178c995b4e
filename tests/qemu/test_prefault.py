"""Tests of guest-physical ranges of QEMU's RAM, and of the population of KVM's second-stage page tables."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from pageferry.workloads.qemu.guest import QemuWorkload
from pageferry.workloads.qemu.kvm_prefault import VirtualMachine, ram_ranges
from tests.guest.machines import GuestParts
from tests.qemu import kvm_owner

GIB = 1 << 30


@pytest.mark.oldest_qemu
@pytest.mark.parametrize(("machine", "below"), [("pc", 3 * GIB), ("q35", 2 * GIB)])
def test_guest_physical_ranges_of_memory_are_found(
    parts: GuestParts, registry: Registry, machine: str, below: int
) -> None:
    async def scenario() -> None:
        guest = await QemuWorkload.start("guest", parts.bare("-m", "5G", "-machine", machine, "-vga", "std", "-S"))
        async with await Monitor.open(str(registry.path / "guest" / "qmp.sock")) as monitor:
            said = await monitor.execute("human-monitor-command", command_line="info mtree -f")
        (region,) = guest.regions
        ranges = ram_ranges(said, region.name)
        low, *middle, high = ranges
        assert (low.address, low.offset) == (0, 0)
        assert all(one.address == one.offset and one.address < below for one in (low, *middle))
        assert middle[-1].offset + middle[-1].length == below
        assert (high.address, high.offset, high.length) == (4 * GIB, below, region.length - below)
        # Video memory and ROMs take the other parts of the first MiB.
        assert 0 <= region.length - sum(one.length for one in ranges) <= 384 << 10
        # Without KVM there are no second-stage page tables to populate.
        assert VirtualMachine.find(guest.pid) is None
        assert await guest.prefault() == 0
        await guest.discard()

    asyncio.run(scenario())


@pytest.fixture
def owner(root: None) -> Iterator[tuple[int, int]]:
    """Yield the pid of a process with a KVM virtual machine, and the machine's value of KVM_CAP_PRE_FAULT_MEMORY."""
    command = [sys.executable, kvm_owner.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        if not said.isdecimal():
            pytest.skip(f"KVM cannot create a virtual machine: {said}")
        yield process.pid, int(said)
        process.kill()


def test_virtual_machine_of_a_process_is_found(owner: tuple[int, int]) -> None:
    pid, capability = owner
    machine = VirtualMachine.find(pid)
    assert machine is not None
    links = {number: str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in (machine.machine, machine.vcpu)}
    assert links == {machine.machine: "anon_inode:kvm-vm", machine.vcpu: "anon_inode:kvm-vcpu:0"}
    assert machine.can_prefault == (capability > 0)


def test_second_stage_tables_are_populated(owner: tuple[int, int]) -> None:
    """The mappings of the process stay unchanged, whether or not KVM supports KVM_PRE_FAULT_MEMORY."""
    pid, capability = owner
    machine = VirtualMachine.find(pid)
    assert machine is not None
    maps = Path(f"/proc/{pid}/maps").read_text()
    ranges = [(kvm_owner.ADDRESS, kvm_owner.ADDRESS + kvm_owner.LENGTH)]
    if capability:
        assert machine.prefault(ranges) == kvm_owner.LENGTH
        with pytest.raises(OSError, match="injected system call failed"):
            machine.prefault([(1 << 40, (1 << 40) + 4096)])
    else:
        with pytest.raises(OSError, match="injected system call failed"):
            machine.prefault(ranges)
    assert Path(f"/proc/{pid}/maps").read_text() == maps
    if not capability:
        pytest.skip("KVM lacks KVM_CAP_PRE_FAULT_MEMORY on this host: only the refusal was tested")
