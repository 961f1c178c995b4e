"""Tests of the source distribution, from which `pip` builds the package where there is no wheel."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BUILT_FROM = ("src", "crates", "packaging", "Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md", "LICENSE")
"""Tracked files and directories that a build of the package reads."""


def test_source_distribution_contains_all_files_of_the_build(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files", *BUILT_FROM], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a checkout of the repository")
    maturin = Path(sys.executable).parent / "maturin"
    subprocess.run([maturin, "sdist", "--out", tmp_path], cwd=ROOT, check=True, capture_output=True)
    (package,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(package) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert set(listed.stdout.split()) <= packed
