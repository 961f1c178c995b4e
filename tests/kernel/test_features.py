"""Feature probes, compared with other kernel interfaces that report the same facts."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pageferry import _engine
from pageferry._engine import Advice
from pageferry.host.probes import PROBES, Feature, kernel, machine, pages, processes
from pageferry.host.probes.kernel import LARGE_PAGE, SMALL_PAGE, Anonymous
from tests import hugetlb
from tests.kernel.probing import Seen

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "tests.kernel.probing"]
DEADLINE = 60
OTHER_USER = 65534
CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_SYS_NICE = 19, 21, 23


pytestmark = pytest.mark.alone


def probing(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module", params=["self", "other-user"])
def seen(request: pytest.FixtureRequest) -> Seen:
    """Return the features of this user or, for the parameter `other-user`, of a user without privileges."""
    if request.param == "other-user" and os.geteuid() != 0:
        pytest.skip("only root can change to another user")
    ended = probing("features", *([str(OTHER_USER)] if request.param == "other-user" else []))
    assert (ended.returncode, ended.stderr) == (0, "")
    return msgspec.json.decode(ended.stdout, type=Seen)


def has(seen: Seen, capability: int) -> bool:
    return bool(seen.capabilities >> capability & 1)


def test_every_feature_is_reported_and_only_missing_ones_have_a_remedy(seen: Seen) -> None:
    assert list(seen.features) == [probe.name for probe in PROBES]
    for name, feature in seen.features.items():
        assert feature.detail
        assert "probe" not in feature.detail, f"{name}: {feature.detail}"
        assert (feature.remedy is None) == feature.available


def test_features_for_root_need_privileges(seen: Seen) -> None:
    unprivileged_faults = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    expected = {
        "userfaultfd-kernel-faults": has(seen, CAP_SYS_PTRACE) or unprivileged_faults,
        "large-tmpfs": has(seen, CAP_SYS_ADMIN) and pages.mode("shmem_enabled") != "deny",
        "madv-collapse-remote": has(seen, CAP_SYS_NICE),
    }
    assert {name: seen.features[name].available for name in expected} == expected
    for name, available in expected.items():
        if not available and name != "large-tmpfs":
            assert "EPERM" in seen.features[name].detail
            assert "run as root" in (seen.features[name].remedy or "")


def test_userfaultfd_detail_names_the_faults_it_handles(seen: Seen) -> None:
    found = seen.features["userfaultfd"]
    assert found.available == Path("/proc/sys/vm/unprivileged_userfaultfd").exists()
    assert ("user mode only" in found.detail) == (not seen.features["userfaultfd-kernel-faults"].available)


def test_userfaultfd_features_match_feature_bits(seen: Seen) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    file = libc.syscall(323, os.O_CLOEXEC | 1)  # handles faults of user mode only
    if file == -1:
        pytest.skip("cannot create a userfaultfd")
    handshake = bytearray(struct.pack("=3Q", 0xAA, 0, 0))
    fcntl.ioctl(file, 0xC018AA3F, handshake)
    os.close(file)
    offered = struct.unpack("=3Q", handshake)[1]
    bits = {
        "uffd-missing-shmem": 5,
        "uffd-minor-shmem": 10,
        "uffd-wp-sync": 12,
        "uffd-poison": 14,
        "uffd-wp-async-shmem": 15,
    }
    assert {name: seen.features[name].available for name in bits} == {
        name: bool(offered >> bit & 1) for name, bit in bits.items()
    }


def test_process_access_matches_ptrace_permission(seen: Seen) -> None:
    yama = processes.YAMA.read_text().strip() if processes.YAMA.exists() else "0"
    may = yama == "0" or (yama != "3" and has(seen, CAP_SYS_PTRACE))
    if Path("/proc/self/status").read_text().split("Seccomp:")[1].split()[0] != "0":
        pytest.skip("these tests run under a seccomp filter")
    assert seen.features["ptrace"].available == may
    assert seen.features["pidfd-getfd"].available == may
    assert seen.features["adopt"].available == (may and seen.features["uffd-wp-async-shmem"].available)


def test_hugetlb_pool_matches_meminfo(seen: Seen) -> None:
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = int(meminfo["HugePages_Total"]), int(meminfo["HugePages_Free"])
    assert seen.features["hugetlb"].detail.startswith(f"{free} of {total} pages of 2 MiB free")
    reserved = int(meminfo["HugePages_Rsvd"])
    surplus = int(Path("/proc/sys/vm/nr_overcommit_hugepages").read_text())
    assert seen.features["hugetlb"].available == (free - reserved + surplus > 0)


def test_hugetlb_pool_with_one_page_is_found(root: None) -> None:
    with hugetlb.reserved(1):
        found = msgspec.json.decode(probing("features").stdout, type=Seen).features["hugetlb"]
        assert found.available
        assert f" of {int(hugetlb.POOL.read_text())} pages" in found.detail
        assert int((pages.HUGETLB / "free_hugepages").read_text()) > 0


def test_kvm_needs_its_device(seen: Seen) -> None:
    kvm, ahead = seen.features["kvm"], seen.features["kvm-pre-fault-memory"]
    if not seen.opens_kvm:
        assert not kvm.available
        assert f"({errno.errorcode[errno.EACCES if Path('/dev/kvm').exists() else errno.ENOENT]})" in kvm.detail
    assert kvm.available or not ahead.available


def test_ksm_matches_sysfs(seen: Seen) -> None:
    found = seen.features["ksm"]
    if not machine.KSM.exists():
        assert not found.available
        return
    state = (machine.KSM / "run").read_text().strip()
    assert found.available == (state == "0" and seen.starts_ksm)
    assert found.detail.startswith("running" if state == "1" else "stopped")
    assert ("not in use" in found.detail) == ((machine.KSM / "pages_sharing").read_text().strip() == "0")


def test_probes_change_no_machine_wide_setting() -> None:
    switches = [*Path("/sys/kernel/mm").glob("transparent_hugepage/*enabled"), pages.HUGETLB / "nr_hugepages"]
    switches += [machine.KSM / "run", Path("/proc/sys/vm/unprivileged_userfaultfd")]
    before = {path: path.read_text() for path in switches if path.exists()}
    mounts = Path("/proc/self/mounts").read_text()
    assert probing("features").returncode == 0
    assert {path: path.read_text() for path in before} == before
    assert Path("/proc/self/mounts").read_text() == mounts


def test_pagemap_scan_matches_pagemap() -> None:
    memory = Anonymous(LARGE_PAGE)
    kernel.madvise(memory.address, LARGE_PAGE, Advice.NOHUGEPAGE)
    for page in (0, 1, 7, 100, 511):
        _engine.write_memory(memory.address + page * SMALL_PAGE, b"x")
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(memory.address // SMALL_PAGE * 8)
        entries = pagemap.read(512 * 8)
    present = {page for page in range(512) if entries[page * 8 + 7] & 0x80}
    ranges = kernel.present(memory.address, LARGE_PAGE)
    found = {(at - memory.address) // SMALL_PAGE for start, end in ranges for at in range(start, end, SMALL_PAGE)}
    assert found == present == {0, 1, 7, 100, 511}


def large_bytes(address: int) -> int:
    """Return the size of the huge pages in the private mapping at an address, bytes (`AnonHugePages` in smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise LookupError(hex(address))


def test_large_pages_match_smaps() -> None:
    if pages.mode("enabled") == "never":
        pytest.skip("transparent huge pages are disabled")
    memory = Anonymous(LARGE_PAGE)
    kernel.madvise(memory.address, LARGE_PAGE, Advice.HUGEPAGE)
    _engine.write_memory(memory.address, b"x")
    assert kernel.large_pages_mapped(memory.address) == (large_bytes(memory.address) >= LARGE_PAGE)
    kernel.madvise(memory.address, SMALL_PAGE, Advice.COLD)
    assert kernel.large_pages_mapped(memory.address) == (large_bytes(memory.address) >= LARGE_PAGE)


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Feature], int]:
    """Return the results of misbehaving probes, and the pid of a child process that one of the probes has started."""
    file = tmp_path_factory.mktemp("misbehaving") / "child"
    ended = probing("misbehaving", CHILD_FILE=str(file))
    assert (ended.returncode, ended.stderr) == (0, "")
    return msgspec.json.decode(ended.stdout, type=dict[str, Feature]), int(file.read_text())


@pytest.mark.parametrize(
    ("probe", "detail", "remedy"),
    [
        ("dies", "the probe was killed by SIGSEGV", "the remedy"),
        ("hangs_with_a_child", "the probe did not finish within 2 s", "the remedy"),
        ("exits", "the probe exited without a result", "the remedy"),
        ("errs", "the probe itself failed: ZeroDivisionError: mistake", "the remedy"),
        ("refused", "/nowhere: No such file or directory (ENOENT)", "the remedy"),
        ("unavailable", "not here", "go elsewhere"),
    ],
)
def test_probe_that_misbehaves_is_reported_as_such(
    misbehaving: tuple[dict[str, Feature], int], probe: str, detail: str, remedy: str
) -> None:
    assert misbehaving[0][probe] == Feature(probe, False, detail, remedy)


def test_probe_beside_misbehaving_ones_is_reported(misbehaving: tuple[dict[str, Feature], int]) -> None:
    assert misbehaving[0]["writes"] == Feature("writes", True, "wrote")


def test_children_of_a_hanging_probe_are_killed_with_it(misbehaving: tuple[dict[str, Feature], int]) -> None:
    status = Path(f"/proc/{misbehaving[1]}/stat")
    assert not status.exists() or status.read_text().rsplit(")")[1].split()[0] == "Z"


def check_denied(denied: str, search_path: str) -> tuple[int, dict[str, Any], str]:
    ended = probing("denied", denied, "check", "--output", "json", PATH=search_path)
    return ended.returncode, json.loads(ended.stdout.splitlines()[-1]), ended.stderr


def test_kernel_without_userfaultfd_cannot_do_the_main_job() -> None:
    code, report, message = check_denied(f"userfaultfd={errno.ENOSYS}", "")
    assert (code, report["main-job"], report["qemu"]) == (3, False, [])
    assert message == f"pageferry: error: {report['reason']}\n"
    found = {feature["name"]: feature for feature in report["features"]}
    for name in ("userfaultfd", "uffd-wp-async-shmem", "uffd-minor-shmem"):
        assert not found[name]["available"]
        assert re.search("ENOSYS|Function not implemented", found[name]["detail"])
        assert "CONFIG_USERFAULTFD" in found[name]["remedy"]
    assert found["pagemap-scan"]["available"]
    statuses = {system["system"]: system["status"] for system in report["systems"]}
    assert {system: statuses[system] for system in ("S2", "S4", "S8", "S10")} == {
        "S2": "unavailable",
        **dict.fromkeys(("S4", "S8", "S10"), "fallback"),  # save while paused; load all memory before the workload runs
    }


def test_denied_process_access_affects_guests_only(tmp_path: Path) -> None:
    code, report, _ = check_denied("unused=1", "")
    found = {feature["name"]: feature for feature in report["features"]}
    assert not found["adopt"]["available"]
    assert "seccomp" in found["adopt"]["detail"]
    assert (code, report["main-job"], report["reason"]) == (0, True, None)
    write_traces = report["systems"][1]
    assert (write_traces["system"], write_traces["status"]) == ("S2", "fallback")
    assert "adopt" in write_traces["missing"]

    qemu = tmp_path / "qemu-system-x86_64"
    qemu.write_text("#!/bin/sh\necho QEMU emulator version 1.2.3\n")
    qemu.chmod(0o755)
    code, report, message = check_denied("unused=1", str(tmp_path))
    assert (code, report["main-job"]) == (3, False)
    assert "QEMU guests" in message
