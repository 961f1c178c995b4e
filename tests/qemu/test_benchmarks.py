"""The benchmarks work: small, and once. Their figures are nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measuring.tables import Target
from benchmarks.restoring import tables as restoring
from benchmarks.saving import tables as saving

ROOT = Path(__file__).parent.parent.parent


def quick(name: str, *options: str) -> dict[str, Any]:
    """What a benchmark finds in a hurry."""
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", *options]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root", "qemu_10", "checker_initrd")
def test_checkpoints_are_measured_beside_their_peers() -> None:
    results = quick("checkpoint")
    ways = {(run["line"], run["method"]) for run in results["guests"]}
    assert {line for line, _ in ways} == {"pageferry", "QEMU"}
    assert len(ways) == 5
    for run in results["guests"]:
        assert run["pause-ms"] > 0
        assert run["bytes"] > 0
    for run in results["codecs"]:
        assert run["codec-mib-s"] > 0
    assert "| pageferry | lazy |" in "\n".join(saving.render(results))
    assert all(isinstance(target, Target) for target in saving.judge(results))


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("root", "qemu_10", "checker_initrd")
def test_restores_are_measured_beside_their_peers() -> None:
    results = quick("restore")
    ways = {(run["line"], run["method"]): run for run in results["guests"]}
    assert len(ways) == 7
    for run in results["guests"]:
        assert run["running-ms"] > 0
        assert run["bytes-read"] > 0
    assert ways["pageferry", "lazy, no prefetch"]["prefetched"] == 0
    assert ways["pageferry", "lazy"]["complete-ms"] > ways["pageferry", "lazy"]["running-ms"]
    assert {run["method"]: run["faults"] > 0 for run in results["arenas"]} == {"lazy": True, "eager": False}
    assert "| QEMU | stream |" in "\n".join(restoring.render(results))
    assert all(isinstance(target, Target) for target in restoring.judge(results))
