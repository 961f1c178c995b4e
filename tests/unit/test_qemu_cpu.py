"""Tests of the comparison of guest CPUs by their features, and of the validation of data from a peer or an image."""

from __future__ import annotations

from typing import Any

import pytest

from pageferry.errors import WorkloadError
from pageferry.workloads.qemu.cpu import Cpu

SIGNATURE = "AuthenticAMD/15/107/1/40"
FEATURES = "1.ecx=80002001 1.edx=78bfbfd 7.0.ebx=20"
NAMED = Cpu("qemu64", SIGNATURE, FEATURES)
HOST = Cpu("host", SIGNATURE, FEATURES)


def changed(cpu: Cpu, **details: Any) -> dict[str, Any]:
    return cpu.details | {f"cpu-{name}": value for name, value in details.items()}


def test_identical_cpus_match() -> None:
    assert NAMED.mismatch(NAMED.details) is None


def test_details_without_a_cpu_match() -> None:
    assert NAMED.mismatch({"machine": "pc", "cpus": 1}) is None


def test_models_that_differ_are_named() -> None:
    assert NAMED.mismatch(HOST.details) == ("-cpu host", "qemu64")


def test_signatures_that_differ_are_described() -> None:
    theirs = changed(HOST, signature="GenuineIntel/6/207/2/46")
    assert HOST.mismatch(theirs) == (
        "-cpu host with vendor GenuineIntel, family 6, model 207, stepping 2, phys-bits 46",
        "vendor AuthenticAMD, family 15, model 107, stepping 1, phys-bits 40",
    )


@pytest.mark.parametrize("cpu", [NAMED, HOST])
def test_missing_features_are_named_by_leaf_register_and_bit(cpu: Cpu) -> None:
    theirs = changed(cpu, features=FEATURES + " 7.0.ecx=5")
    found = cpu.mismatch(theirs)
    assert found is not None
    assert found[0] == f"-cpu {cpu.model} with CPUID 7.0.ecx bit 0, CPUID 7.0.ecx bit 2"


def test_many_missing_features_are_counted() -> None:
    found = NAMED.mismatch(changed(NAMED, features="7.1.eax=ffffffff"))
    assert found is not None
    assert found[0].endswith("CPUID 7.1.eax bit 11 and 20 more")


def test_additional_features_are_refused_unless_the_host_decides_about_them() -> None:
    fewer = "1.edx=78bfbfd"
    found = NAMED.mismatch(changed(NAMED, features=fewer))
    assert found is not None
    assert "without CPUID 1.ecx bit 0" in found[0]
    assert HOST.mismatch(changed(HOST, features=fewer)) is None


def test_vcpus_that_differ_are_compared_one_by_one() -> None:
    several = Cpu("qemu64", SIGNATURE, f"{FEATURES};1.edx=1")
    assert several.mismatch(several.details) is None
    assert several.mismatch(NAMED.details) == ("1 kinds of vCPUs", "2")


@pytest.mark.parametrize(
    "features",
    ["x", "1.edx", "1.edx=", "1.edx=123456789", "1.edx=1  1.ecx=1", "1.edx=1\n", "1.edx=１", "1.edx=1 " * 5000, 7],
)
def test_invalid_features_are_refused(features: Any) -> None:
    with pytest.raises(WorkloadError, match="invalid cpu-features"):
        NAMED.mismatch(changed(NAMED, features=features))


@pytest.mark.parametrize("signature", ["", "/" * 100_000, 5, "a/b"])
def test_invalid_signatures_differ_and_are_cut(signature: Any) -> None:
    found = NAMED.mismatch(changed(NAMED, signature=signature))
    assert found is not None
    assert len(found[0]) < 300
