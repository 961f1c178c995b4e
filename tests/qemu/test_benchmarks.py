"""Tests of the benchmarks: with --quick, they report complete results. The tests do not check the times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.checkpoint import tables as checkpoint
from benchmarks.disks import tables as disks
from benchmarks.harness.tables import Target
from benchmarks.identity import __main__ as identity
from benchmarks.links import __main__ as links
from benchmarks.links import loopback, networks
from benchmarks.postcopy import accesses, ledgers
from benchmarks.postcopy import tables as postcopy
from benchmarks.python import __main__ as python
from benchmarks.restore import tables as restore
from benchmarks.store import tables as store
from tests.network import hosts

ROOT = Path(__file__).parent.parent.parent


def quick(name: str, *options: str) -> dict[str, Any]:
    """Run a benchmark with --quick, and return its results."""
    return cast(dict[str, Any], json.loads(run("-m", f"benchmarks.{name}", "--quick", *options)))


def run(*command: str) -> str:
    """Run Python with these arguments in the root of this repository, and return its output."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def shown(*options: str) -> list[dict[str, Any]]:
    """Run the benchmark of all systems with --quick, and return the rows of its table."""
    rows: list[dict[str, Any]] = json.loads(run("-m", "benchmarks.systems", "--quick", "--json", *options))
    return rows


def test_benchmark_of_python_arrays_covers_installed_formats() -> None:
    results = quick("python", "--repetitions", "1")
    assert {"pageferry", "numpy"} <= {run["format"] for run in results["arrays"]}
    for run in results["arrays"]:
        assert min(run[figure] for figure in ("save-ms", "first-ms", "random-us", "pass-ms")) > 0
    assert {run["format"] for run in results["frames"]} >= {"pageferry", "pandas pickle"}
    memory = {(run["format"], run["workers"]): run["memory"] for run in results["workers"]}
    assert memory["pageferry, shared", 4] < 2 * memory["pageferry, shared", 1] < memory["pageferry", 4]
    assert "| random | pageferry |" in "\n".join(python.render(results))
    assert all(isinstance(target, Target) for target in python.judge(results))


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root", "qemu_10", "checker_initrd")
def test_checkpoint_benchmark_covers_all_methods() -> None:
    results = quick("checkpoint")
    ways = {(run["line"], run["method"]) for run in results["guests"]}
    assert {line for line, _ in ways} == {"pageferry", "QEMU"}
    assert len(ways) == 5
    for run in results["guests"]:
        assert run["pause-ms"] > 0
        assert run["bytes"] > 0
    for run in results["codecs"]:
        assert run["codec-mib-s"] > 0
    assert "| pageferry | lazy |" in "\n".join(checkpoint.render(results))
    assert all(isinstance(target, Target) for target in checkpoint.judge(results))


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root", "qemu_10", "checker_initrd")
def test_restore_benchmark_covers_all_methods() -> None:
    results = quick("restore")
    ways = {(run["line"], run["method"]): run for run in results["guests"]}
    assert len(ways) == 7
    for run in results["guests"]:
        assert run["running-ms"] > 0
        assert run["bytes-read"] > 0
    assert ways["pageferry", "lazy, no prefetch"]["prefetched"] == 0
    assert ways["pageferry", "lazy"]["complete-ms"] > ways["pageferry", "lazy"]["running-ms"]
    assert {run["method"]: run["faults"] > 0 for run in results["arenas"]} == {"lazy": True, "eager": False}
    assert {run["contents"] for run in results["fill"]} == {"incompressible", "half compressible"}
    assert all(run["fio-mib-s"] > 0 and run["cold-mib-s"] > 0 for run in results["fill"])
    assert [run["threads"] for run in results["fault-threads"]] == [1, 4, 16, 64]
    assert all(run["faults"] > 0 and run["cpu-ns"] > 0 for run in results["fault-threads"])
    assert "| QEMU | stream |" in "\n".join(restore.render(results))
    assert all(isinstance(target, Target) for target in restore.judge(results))


@pytest.mark.only_full
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("root", "qemu_10", "checker_initrd")
def test_store_benchmark_covers_all_methods() -> None:
    pytest.importorskip("moto", reason="the S3 server of the package moto is not installed")
    results = quick("store")
    assert [run["requests"] for run in results["requests"]] == [2, 3]
    assert {run["method"] for run in results["arenas"]} >= {"local", "store", "store, eager", "download, then local"}
    assert all(run["complete-ms"] > 0 and run["iperf3-mbps"] > 0 for run in results["arenas"])
    assert len({run["method"] for run in results["guests"]}) == 7
    assert all(run["command-to-resume-ms"] > 0 for run in results["guests"])
    assert "| store, eager |" in "\n".join(store.render(results))
    assert all(isinstance(target, Target) for target in store.judge(results))


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root", "qemu_10", "guest_kernel", "checker_initrd")
def test_disks_benchmark_covers_all_methods() -> None:
    results = quick("disks", "--only", "mirrored")
    assert [run["method"] for run in results["mirrored"]] == ["QEMU, background", "QEMU, write-blocking", "pageferry"]
    assert all(run["elapsed-ms"] > run["stop-to-resume-ms"] > 0 for run in results["mirrored"])
    assert "| pageferry |" in "\n".join(disks.render(results))
    assert all(isinstance(target, Target) for target in disks.judge(results))


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root", "qemu_10", "checker_initrd")
def test_postcopy_benchmark_covers_all_modes() -> None:
    results = quick("postcopy")
    assert [run["method"] for run in results["accesses"]] == list(accesses.METHODS)
    guests = {(run["line"], run["mode"].split(",")[0]): run for run in results["guests"]}
    assert set(guests) == {(line, mode) for line in ("pageferry", "QEMU") for mode in ledgers.MODES} | {
        ("QEMU", "precopy")
    }
    for run in guests.values():
        assert run["total-ms"] > 0
    for run in results["ledger"]:
        assert run["mode"] == "precopy" or run["late-pages"] > 0
    assert "| pageferry | hybrid |" in "\n".join(postcopy.render(results))
    assert all(isinstance(target, Target) for target in postcopy.judge(results))


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root")
def test_links_benchmark_covers_all_links_and_methods() -> None:
    if reason := hosts.missing():
        pytest.skip(reason)
    results = quick("links")
    assert {(run["link"], run["streams"]) for run in results["loopback"]} == {
        (link, streams) for link in ("plain", "TLS") for streams in loopback.QUICK_STREAMS
    }
    assert {run["link"] for run in results["networks"]} == set(networks.LINKS)
    assert {run["method"] for run in results["networks"]} == set(networks.METHODS)
    for run in results["loopback"] + results["networks"]:
        assert run["total-ms"] > 0
    assert "| TLS | 4 |" in "\n".join(links.render(results))
    assert all(isinstance(target, Target) for target in links.judge(results))


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root", "qemu_10")
def test_deltas_benchmark_reports_savings_by_program() -> None:
    results = quick("deltas")["deltas"]
    saved = {run["program"]: run["delta"] < run["whole"] / 2 for run in results if run["codec"] == "zstd"}
    assert saved == {"database": True, "dictionary": True, "array": True, "text": False, "built-in workload": False}


@pytest.mark.only_full
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("root", "qemu_10", "generic_kernel")
def test_identity_benchmark_compares_guests_with_and_without_generation_id() -> None:
    results = quick("identity")
    equal = {run["guests"]: run["equal"] for run in results["random"]}
    assert list(equal) == list(identity.CASES)
    assert equal["vmgenid, different GUIDs"] < 5
    assert "| no vmgenid |" in "\n".join(identity.render(results))


@pytest.mark.only_full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("root", "qemu_10")
def test_disks_benchmark_compares_pauses_with_and_without_a_disk() -> None:
    if not (ROOT / ".cache/debian/vmlinuz").exists() or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no Debian guest (`make system` fetches it), or no /dev/fuse")
    results = quick("disks", "--only", "pauses")
    assert {"no disk", "record"} <= {run["method"] for run in results["pauses"]}
    for run in results["pauses"]:
        assert run["pause-ms"] > 0
    assert "| record | 0 MiB |" in "\n".join(disks.render(results))
    assert all(isinstance(target, Target) for target in disks.judge(results))


COUNTED = ("S3", "S5", "S6", "S7", "S8")
"""Systems whose targets are counts, not times."""


def of_arenas(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Return, for each system in `COUNTED`, whether its target is reached."""
    return {row["system"]: row["reached"] for row in rows if row["system"] in COUNTED}


CHOSEN = [word for system in ("S3", "S5", "S6", "S8") for word in ("--only", system)]


@pytest.mark.alone  # compares counts of huge pages and faults with targets
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("root", "qemu_10")
def test_each_system_reaches_its_target_with_its_mechanism() -> None:
    assert of_arenas(shown(*CHOSEN)) == dict.fromkeys(COUNTED, True)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("root", "qemu_10")
def test_each_system_misses_its_target_without_its_mechanism() -> None:
    off = [word for system in (*COUNTED, "S1", "S2", "S4") for word in ("--without", system)]
    rows = shown(*CHOSEN, "--only", "S2", *off)
    assert of_arenas(rows) == dict.fromkeys(COUNTED, False)
    others = {row["system"]: row["reached"] for row in rows if row["system"] in ("S1", "S2", "S4")}
    assert others == {"S1": False, "S2": False, "S4": False}


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root", "qemu_10", "checker_initrd")
def test_table_of_systems_compares_guest_checkpoint_and_restore_with_peers() -> None:
    rows = shown("--only", "saved guest", "--without", "S4", "--without", "S10")
    saved = {row["system"]: row for row in rows if row["exercised"].startswith("QEMU guest")}
    assert set(saved) == {"S4", "S10"}
    assert all(row["peer"] > 0 and not row["reached"] for row in saved.values())


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root", "qemu_10", "checker_initrd")
def test_table_of_systems_compares_guest_migration_with_its_peer() -> None:
    rows = shown("--only", "moved guest", "--without", "S7")
    moved = {row["system"]: row for row in rows if row["exercised"].startswith("QEMU guest")}
    assert set(moved) == {"S1", "S7"}
    assert not moved["S7"]["reached"]
    assert all(row["peer"] > 0 for row in moved.values())


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root", "qemu_10")
def test_sizes_benchmark_measures_each_size() -> None:
    results = quick("sizes")["sizes"]
    assert len({run["load"] for run in results}) == 2
    for run in results:
        assert run["saved-mib-s"] > 0
        assert run["read-kib"] > 0
