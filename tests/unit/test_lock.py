"""Tests of the lock files for development and CI: locked versions for every supported Python, hashes, upper bounds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent.parent
LOCKS = ("requirements.lock", "requirements-source.lock", "requirements-full.lock", "requirements-release.lock")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared() -> list[Requirement]:
    project = PROJECT["project"]
    groups = project["optional-dependencies"].values()
    texts = [
        *PROJECT["build-system"]["requires"],
        *project["dependencies"],
        *(one for group in groups for one in group),
    ]
    return [Requirement(text) for text in texts]


def locked(python: str) -> dict[str, Requirement]:
    """Return the requirements, by package name, that pip installs on Linux for a version of CPython."""
    environment: dict[str, Any] = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    found: dict[str, Requirement] = {}
    for name in LOCKS:
        for line in re.findall(r"^[a-z].*(?= \\$)", (ROOT / name).read_text(), re.MULTILINE):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate(environment):
                same = found.setdefault(one.name, one)  # the tools of a release share packages with development
                assert same.specifier == one.specifier, f"{one.name} twice for Python {python}"
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_locked_within_its_range(python: str) -> None:
    versions = {name: next(iter(one.specifier)) for name, one in locked(python).items()}
    for requirement in declared():
        version = versions[canonicalize_name(requirement.name)]
        assert version.operator == "=="
        assert requirement.specifier.contains(version.version), requirement


@pytest.mark.parametrize("name", LOCKS)
def test_locked_packages_have_hashes_and_no_host(name: str) -> None:
    text = (ROOT / name).read_text()
    packages = re.split(r"\n(?=[a-z])", text)[1:]
    assert packages
    for package in packages:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package
    assert "://" not in text
    assert "--index" not in text


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_range_has_an_upper_bound(requirement: Requirement) -> None:
    operators = {one.operator for one in requirement.specifier}
    assert operators & {"<", "<=", "==", "~="}


def test_make_installs_from_the_lock() -> None:
    makefile = (ROOT / "Makefile").read_text()
    installs = re.findall(r"pip install .*", makefile)
    assert installs
    assert all("--require-hashes" in line for line in installs)
    builds = re.findall(r"^\t.*(?:cargo (?:test|clippy|build)|maturin).*", makefile, re.MULTILINE)
    assert builds
    assert all("--locked" in line for line in builds)
