"""Tests that interrupted checkpoints (S4) leave no partial image and do not affect the workload."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pageferry.errors import CheckpointError, WorkloadDied
from tests.kernel.programs import Program
from tests.saved import check_ledger

MIB = 1 << 20
SLOWLY = ("--bandwidth", "16M")
"""Options that limit the bandwidth, which leaves time to interrupt the checkpoint."""


@contextmanager
def ledger(name: str, *, dies: bool = False, processes: int = 1) -> Iterator[Program]:
    """Run a ledger in a separate process. Unless `dies` is true, check at the end that no write was lost."""
    options = {"threads": 2, "zero_fraction": 0.2, "working_set": 0.1}
    setup = {"name": name, "size": 32 * MIB, "options": options, "exact": True, "processes": processes}
    with Program("-m", "pageferry.demo.process", json.dumps(setup)) as program:
        program.json()
        yield program
        if not dies:
            time.sleep(0.1)
            program.process.send_signal(signal.SIGTERM)
            assert program.json()["intact"]
            assert program.wait() == 0


def command(name: str, image: Path, *options: str) -> list[str]:
    return ["-m", "pageferry", "checkpoint", name, str(image), "--output", "json", *options]


def run(name: str, image: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *command(name, image, *options)], capture_output=True, timeout=60)


def save_well(name: str, image: Path) -> None:
    """Check that the next checkpoint is complete and correct."""
    done = run(name, image)
    assert done.returncode == 0, done.stderr
    check_ledger(image)


def until(program: Program, kind: str) -> dict[str, Any]:
    """Return the next event of this type."""
    while True:
        line: dict[str, Any] = program.json()
        if line["type"] == kind:
            return line


@pytest.mark.parametrize("point", ["armed", "snapshot-point", "checkpoint-progress"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_or_interrupted_checkpoint_leaves_no_image(tmp_path: Path, point: str, number: signal.Signals) -> None:
    with ledger("victim", processes=2):
        with Program(*command("victim", tmp_path / "image", *SLOWLY)) as saver:
            until(saver, point)
            saver.process.send_signal(number)
            code = saver.wait()
        assert code == (-9 if number is signal.SIGKILL else 128 + number)
        assert os.listdir(tmp_path) == []
        save_well("victim", tmp_path / "image")


def test_checkpoint_killed_at_a_random_time_leaves_no_partial_image(tmp_path: Path) -> None:
    chance = random.Random(4)
    with ledger("victim"):
        for _ in range(10):
            with Program(*command("victim", tmp_path / "image", "--bandwidth", "200M")) as saver:
                until(saver, "armed")
                time.sleep(chance.random() * 0.1)
                saver.kill()
        (tmp_path / "image").unlink(missing_ok=True)  # a checkpoint may have completed before it was killed
        assert os.listdir(tmp_path) == []
        save_well("victim", tmp_path / "image")


@pytest.mark.parametrize("mode", ["lazy", "stop"])
def test_checkpoint_on_a_full_disk_fails_and_frees_its_space(tmp_path: Path, root: None, mode: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", small], check=True)
    try:
        with ledger("writer"):
            done = run("writer", small / "image", "--codec", "none", "--mode", mode)
            assert done.returncode == CheckpointError.exit_code
            assert b"free some space" in done.stderr
            assert os.listdir(small) == []
            assert os.statvfs(small).f_bfree == os.statvfs(small).f_blocks
            save_well("writer", tmp_path / "image")
    finally:
        subprocess.run(["umount", small], check=True)


def test_temporary_file_of_a_killed_checkpoint_is_removed_by_the_next(tmp_path: Path) -> None:
    with ledger("writer"):
        environment = os.environ | {"PAGEFERRY_FAULT": "image.linked=kill"}
        done = subprocess.run([sys.executable, *command("writer", tmp_path / "image")], timeout=60, env=environment)
        assert done.returncode == -signal.SIGKILL
        (left,) = os.listdir(tmp_path)
        assert left.startswith(".image.")
        (tmp_path / ".image.notours").touch()
        save_well("writer", tmp_path / "image")
        assert sorted(os.listdir(tmp_path)) == [".image.notours", "image"]


def test_failed_checkpoint_leaves_the_previous_image(tmp_path: Path) -> None:
    with ledger("writer"):
        save_well("writer", tmp_path / "image")
        before = (tmp_path / "image").read_bytes()
        with Program(*command("writer", tmp_path / "image", *SLOWLY)) as saver:
            until(saver, "snapshot-point")
            saver.kill()
        assert (tmp_path / "image").read_bytes() == before


@pytest.mark.parametrize("point", ["snapshot-point", "checkpoint-progress"])
def test_checkpoint_fails_without_an_image_if_the_workload_dies(tmp_path: Path, point: str) -> None:
    with ledger("dying", dies=True) as workload:
        with Program(*command("dying", tmp_path / "image", *SLOWLY), stderr=subprocess.PIPE) as saver:
            until(saver, point)
            workload.kill()
            assert saver.wait() == WorkloadDied.exit_code
            assert saver.process.stderr is not None
            with saver.process.stderr as said:
                assert b"no image was written" in said.read()
        assert os.listdir(tmp_path) == []
