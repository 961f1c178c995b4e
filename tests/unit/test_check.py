"""Tests of `pageferry check`: choice of mechanisms, QEMU versions, output, and completeness of the support matrix."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pageferry.host import qemus
from pageferry.host.check import obstacle
from pageferry.host.events import Check
from pageferry.host.probes import PROBES, Feature
from pageferry.host.probes.systems import ARENAS_MOVE, GUESTS_MOVE, SYSTEMS, choose
from pageferry.host.qemus import Qemu, QemuSearch, find_qemus
from pageferry.report.check import CheckView

ROOT = Path(__file__).parent.parent.parent
NAMES = [probe.name for probe in PROBES]
OTHERS = {"kvm", "kvm-pre-fault-memory", "cpu-quota"}
"""Features that no system needs: they make guests faster, or are required by `--auto-converge`."""


def with_all_but(*missing: str) -> dict[str, Feature]:
    return {
        name: Feature(name, name not in missing, f"{name} tried", f"get {name}" if name in missing else None)
        for name in NAMES
    }


def test_all_systems_are_listed_once_and_need_probed_features() -> None:
    assert [system.number for system in SYSTEMS] == [f"S{number}" for number in range(1, 11)]
    needs = {name for system in SYSTEMS for way in system.mechanisms for name in way.needs}
    assert needs | OTHERS == set(NAMES)


def test_all_features_give_the_preferred_mechanisms() -> None:
    for system in SYSTEMS:
        report = choose(system, with_all_but())
        assert (report.status, report.mechanism, report.missing) == ("ok", system.mechanisms[0].text, [])


def test_without_features_traces_are_unavailable() -> None:
    reports = {system.number: choose(system, with_all_but(*NAMES)) for system in SYSTEMS}
    unavailable = {number for number, report in reports.items() if report.status == "unavailable"}
    assert unavailable == {"S2", "S3"}
    for number, report in reports.items():
        assert (report.mechanism is None) == (number in unavailable)
        assert report.missing == list(SYSTEMS[int(number[1:]) - 1].mechanisms[0].needs)


@pytest.mark.parametrize(
    ("missing", "number", "status", "mechanism"),
    [
        ("large-tmpfs", "S6", "fallback", "huge pages by MADV_COLLAPSE of a memfd"),
        ("madv-collapse-remote", "S1", "fallback", "UFFDIO_CONTINUE, in base pages"),
        ("kvm", "S1", "ok", "MADV_COLLAPSE for huge pages, UFFDIO_CONTINUE for base pages"),
        ("uffd-minor-shmem", "S5", "fallback", "none: every page is mapped on first access"),
        ("adopt", "S2", "fallback", "userfaultfd WP_ASYNC, in arenas of the program itself only"),
        ("pagemap-scan", "S2", "unavailable", None),
        ("ksm", "S9", "fallback", "zeros of guests and arenas freed, other duplicates estimated only"),
    ],
)
def test_best_remaining_mechanism_is_chosen(missing: str, number: str, status: str, mechanism: str | None) -> None:
    report = choose(SYSTEMS[int(number[1:]) - 1], with_all_but(missing))
    assert (report.status, report.mechanism) == (status, mechanism)
    assert report.missing == ([] if status == "ok" else [missing])


@pytest.mark.parametrize("name", NAMES)
def test_main_job_names_the_missing_feature(name: str) -> None:
    features = with_all_but(name)
    for guests, needs in ((False, ARENAS_MOVE), (True, GUESTS_MOVE)):
        reason = obstacle(features, guests)
        if name in needs:
            assert reason is not None
            assert f"{name} tried; get {name}" in reason
        else:
            assert reason is None


def program(folder: Path, script: str, mode: int = 0o755) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)
    return path


def asked(*folders: Path) -> list[Qemu]:
    with QemuSearch(os.pathsep.join(map(str, folders))) as search:
        return search.results()


def test_qemus_are_found_once_in_path_order(tmp_path: Path) -> None:
    first, second = (program(tmp_path / name, "exit 0") for name in ("b", "a"))
    program(tmp_path / "not-executable", "exit 0", 0o644)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / first.name).symlink_to(first)
    (tmp_path / "folder" / first.name).mkdir(parents=True)
    folders = [tmp_path / name for name in ("folder", "nowhere", "not-executable", "b", "link", "a", "b")]
    assert find_qemus(os.pathsep.join(map(str, folders))) == [first, second]


def test_qemu_reports_its_version_or_a_reason(tmp_path: Path) -> None:
    said = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"
    good = program(tmp_path / "good", f'test "$1" = -version && echo "{said}"; echo Copyright')
    fails = program(tmp_path / "fails", "echo no libfoo.so >&2; exit 127")
    silent = program(tmp_path / "silent", "exit 0")
    no_program = program(tmp_path / "broken", "")
    no_program.write_text("#!/nowhere/sh\n")
    assert asked(*(path.parent for path in (good, fails, silent, no_program))) == [
        Qemu(str(good), True, said, "7.2.22"),
        Qemu(str(fails), False, "-version exited with code 127: no libfoo.so"),
        Qemu(str(silent), False, "-version exited with code 0: no output"),
        Qemu(str(no_program), False, "cannot be started: No such file or directory"),
    ]


def test_hanging_qemu_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemus, "_DEADLINE", 0.1)
    hanging = program(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    assert asked(tmp_path) == [Qemu(str(hanging), False, "did not reply to -version within 0.1 s")]
    if (pid := tmp_path / "pid").exists() and (text := pid.read_text()):
        assert not Path(f"/proc/{text.strip()}").exists()


def test_real_qemu_is_found(qemu_system: Path) -> None:
    found = asked(qemu_system.parent)
    said = subprocess.run([qemu_system, "-version"], capture_output=True, text=True, check=True).stdout
    assert found[0].usable
    assert said.startswith(found[0].detail)
    assert f"version {found[0].version}" in said


@pytest.fixture(scope="module")
def report() -> tuple[int, dict[str, Any]]:
    """Run `pageferry check` once. Return its exit code and its JSON output."""
    command = [sys.executable, "-m", "pageferry", "check", "--output", "json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (line,) = ended.stdout.splitlines()
    return ended.returncode, json.loads(line)


def test_json_is_one_object_with_documented_keys(report: tuple[int, dict[str, Any]]) -> None:
    code, found = report
    assert list(found) == ["type", "kernel", "user", "features", "systems", "qemu", "main-job", "reason"]
    assert (found["type"], found["kernel"], found["user"]) == ("check", os.uname().release, os.geteuid())
    assert [feature["name"] for feature in found["features"]] == NAMES
    for feature in found["features"]:
        assert list(feature) == ["name", "available", "detail", "remedy"]
    for system in found["systems"]:
        keys = ["system", "title", "status", "mechanism", "preferred", "missing"]
        assert list(system) == keys
        assert system["status"] in ("ok", "fallback", "unavailable")
    for qemu in found["qemu"]:
        assert list(qemu) == ["path", "usable", "detail", "version"]
    assert code == (0 if found["main-job"] else 3)
    assert found["main-job"] == (found["reason"] is None)


def test_json_is_consistent(report: tuple[int, dict[str, Any]]) -> None:
    _, found = report
    features = {feature["name"]: Feature(**feature) for feature in found["features"]}
    for system, shown in zip(SYSTEMS, found["systems"], strict=True):
        expected = choose(system, features)
        assert (shown["mechanism"], shown["status"]) == (expected.mechanism, expected.status)
    assert found["reason"] == obstacle(features, any(qemu["usable"] for qemu in found["qemu"]))


def shown(result: Check, width: int = 500) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(CheckView().result(result), highlight=False)
    return stream.getvalue()


def a_check(features: dict[str, Feature], qemu: Iterable[Qemu] = ()) -> Check:
    reason = obstacle(features, bool(qemu))
    systems = [choose(system, features) for system in SYSTEMS]
    return Check("6.0", 1000, list(features.values()), systems, list(qemu), reason is None, reason)


def test_tables_are_readable_without_colour() -> None:
    text = shown(a_check(with_all_but("ksm", "large-tmpfs")))
    assert "\x1b" not in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    for name in NAMES:
        assert rows[name][1] == ("no" if name in ("ksm", "large-tmpfs") else "yes")
    assert "→ get ksm" in text
    assert [rows[system][1] for system in ("S6", "S2", "S9")] == ["fallback", "ok", "fallback"]
    assert "better with large-tmpfs: huge pages of a tmpfs with huge=always" in text
    assert "live migration of arenas is possible" in text
    assert "apt install qemu-system-x86" in text


def test_summary_names_what_can_run() -> None:
    qemu = Qemu("/usr/bin/qemu-system-x86_64", True, "QEMU emulator version 7.2", "7.2")
    assert "live migration of arenas and QEMU guests is possible" in shown(a_check(with_all_but(), [qemu]))
    assert "live migration is not possible" in shown(a_check(with_all_but("adopt"), [qemu]))


def test_names_are_not_truncated_on_a_narrow_terminal() -> None:
    text = shown(a_check(with_all_but()), width=80)
    assert max(map(len, text.splitlines())) <= 80
    for name in (*NAMES, *(system.number for system in SYSTEMS)):
        assert re.search(rf"^{name} ", text, re.MULTILINE)


def test_support_matrix_is_complete() -> None:
    text = (ROOT / "docs" / "support.md").read_text()
    features = text.split("\n## Features\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in features.splitlines() if line.startswith("| `")]
    assert [row[0].strip().strip("`") for row in rows] == NAMES
    needed_by: dict[str, set[str]] = {name: set() for name in NAMES}
    for system in SYSTEMS:
        for way in system.mechanisms:
            for name in way.needs:
                needed_by[name].add(system.number)
    for row in rows:
        assert set(re.findall(r"S\d+", row[2])) == needed_by[row[0].strip().strip("`")], row[0]
    for system in SYSTEMS:
        ways = [line for line in text.splitlines() if line.startswith(f"| {system.number} ")]
        assert len(ways) == 1
        assert all(way.text in ways[0] for way in system.mechanisms), system.number
