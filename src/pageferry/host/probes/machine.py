"""Probes of KSM, KVM and control groups."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

from pageferry._engine import Advice
from pageferry.errors import WorkloadError
from pageferry.host.cpu_quota import CpuQuota
from pageferry.host.probes import kernel
from pageferry.host.probes.child import Unavailable
from pageferry.host.probes.kernel import LARGE_PAGE, Anonymous
from pageferry.host.probes.probe import AS_ROOT, Probe, newer_kernel

KSM = Path("/sys/kernel/mm/ksm")
KVM = "/dev/kvm"

_KVM_GET_API_VERSION, _KVM_CREATE_VM, _KVM_CHECK_EXTENSION = 0xAE00, 0xAE01, 0xAE03
_KVM_API_VERSION = 12
_KVM_CAP_PRE_FAULT_MEMORY = 236


def _ksm() -> str:
    memory = Anonymous(LARGE_PAGE)
    kernel.madvise(memory.address, LARGE_PAGE, Advice.MERGEABLE)
    state = {"0": "stopped", "1": "running", "2": "stopped, unmerging"}.get(_ksm_value("run"), "in an unknown state")
    sharing = int(_ksm_value("pages_sharing"))
    found = f"{state}, {f'in use, {sharing} pages shared' if sharing else 'not in use'}"
    if state != "stopped":
        raise Unavailable(found, remedy=f"write 0 to {KSM / 'run'} if no process needs it; only for S9")
    if not os.access(KSM / "run", os.W_OK):
        raise Unavailable(found, remedy=f"{AS_ROOT}; only for S9")
    return found


def _ksm_value(name: str) -> str:
    return (KSM / name).read_text().strip()


def _virtual_machine() -> int:
    device = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(device, _KVM_GET_API_VERSION, 0)
    if version != _KVM_API_VERSION:
        raise Unavailable(f"unsupported KVM API version {version}: expected {_KVM_API_VERSION}")
    return fcntl.ioctl(device, _KVM_CREATE_VM, 0)


def _kvm() -> str:
    _virtual_machine()
    return "created a virtual machine; booting a guest was not tested"


def _kvm_pre_fault() -> str:
    if fcntl.ioctl(_virtual_machine(), _KVM_CHECK_EXTENSION, _KVM_CAP_PRE_FAULT_MEMORY) <= 0:
        raise Unavailable("KVM does not offer KVM_CAP_PRE_FAULT_MEMORY", error=errno.ENOTTY)
    return "offered by KVM"


def _cpu_quota() -> str:
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        quota = CpuQuota([child])
        try:
            quota.limit(0.5)
        finally:
            quota.close()
    except WorkloadError as error:
        raise Unavailable(str(error)) from error
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return f"limited a process to half a CPU ({quota.where})"


_KVM_REMEDY = {
    errno.ENOENT: "load kvm_intel or kvm_amd; in a virtual machine, enable nested virtualisation; else guests use TCG",
    errno.ENODEV: "enable virtualisation in the firmware, or nested virtualisation on the host; else guests use TCG",
    errno.EACCES: "give this user access to /dev/kvm (on Debian: usermod -aG kvm USER), or run as root",
    errno.EPERM: "allow /dev/kvm in this container's device rules",
}

PROBES = (
    Probe("ksm", _ksm, f"{newer_kernel('2.6.32', 'CONFIG_KSM')}; only for S9"),
    Probe("kvm", _kvm, _KVM_REMEDY[errno.ENODEV], _KVM_REMEDY),
    Probe(
        "kvm-pre-fault-memory",
        _kvm_pre_fault,
        newer_kernel("6.11", "CONFIG_KVM, EPT or NPT; optional for S1 and S5"),
        _KVM_REMEDY,
    ),
    Probe(
        "cpu-quota",
        _cpu_quota,
        f"{AS_ROOT}; with cgroup v2 only, start workloads in a separate group (systemd-run --scope -p "
        "CPUWeight=100 pageferry run ...); only for --auto-converge",
    ),
)
