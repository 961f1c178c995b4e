"""Tests that each command imports only the modules that it uses, so that commands start quickly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pageferry.cli.verbs import VERBS

NEVER = {"numpy", "prometheus_client", "cryptography", "mkdocs", "hypothesis"}
WORK = {"asyncio", "qemu.qmp", "ssl", "pageferry.workloads.qemu.guest", "pageferry.migration.api"}
"""Modules that no verb may import to print its help."""

MAX_MODULES = {
    "list": 76,
    "top": 76,
    "check": 66,
    "report": 123,
    "peek": 60,
    "stop": 121,
    "image": 99,
    "migrate": 141,
    "checkpoint": 124,
    "restore": 85,
    "large-pages": 136,
    "sharing": 144,
}
"""Maximum number of modules that each verb imports in addition to those of `import asyncio, msgspec`.

Measured without workloads, and with `--output json`, which does not import rich.
"""
COMMANDS = {
    "list": ["list"],
    "top": ["top", "--once"],
    "check": ["check"],
    "report": ["report", "/dev/null/none"],
    "peek": ["peek", "none", "0", "1"],
    "stop": ["stop", "none"],
    "image": ["image", "info", "/none"],
    "migrate": ["migrate", "none", "127.0.0.1:1"],
    "checkpoint": ["checkpoint", "none", "/none"],
    "restore": ["restore", "--output", "json", "/none", "--", "qemu-system-x86_64"],
    "large-pages": ["large-pages", "none"],
    "sharing": ["sharing", "none"],
}


def imported(program: str, run_directory: Path) -> set[str]:
    """Return the names of all modules that a program has imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint('\\nmodules', *sys.modules)"],
        env={"PATH": os.environ["PATH"], "PAGEFERRY_RUN_DIR": str(run_directory)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("modules "))
    return set(line.split()[1:])


def command(words: list[str], run_directory: Path) -> set[str]:
    return imported(f"from pageferry.cli.main import main\nmain({words!r})", run_directory)


@pytest.fixture(scope="module")
def base() -> set[str]:
    return imported("import asyncio, msgspec", Path("/"))


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_no_part_of_the_work(verb: str, tmp_path: Path) -> None:
    found = command([verb, "--help"], tmp_path)
    assert not found & (NEVER | WORK)
    assert len([name for name in found if name.startswith("pageferry.")]) <= 32


@pytest.mark.parametrize("verb", MAX_MODULES)
def test_verb_imports_only_what_it_uses(verb: str, base: set[str], tmp_path: Path) -> None:
    found = command([*COMMANDS[verb], "--output", "json"], tmp_path) - base
    assert not {name.split(".")[0] for name in found} & (NEVER | {"rich", "rich_argparse", "shtab"})
    assert len(found) <= MAX_MODULES[verb], sorted(found)
