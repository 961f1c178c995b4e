"""Start of Python child processes. Only this module starts them.

`python -m` puts the current directory first on `sys.path`: a child that is started in a directory of another user would
import code from there. A child therefore runs isolated (`-I`: no current directory, no PYTHON* variables, no user
site), in `/`, and without PYTHON* variables, which its own children would inherit. It finds pageferry and its
dependencies where this process has found them: `run_module` appends their directories after the standard library.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from pageferry.host import run_module
from pageferry.host.processes import Outliving

_DEPENDENCIES = ("msgspec", "qemu.qmp", "rich", "rich_argparse", "shtab", "prometheus_client", "obstore", "blake3")
"""Packages whose directories are passed to a child if this process has imported them."""


class Streams(TypedDict, total=False):
    """Arguments of `subprocess.Popen` for the streams and descriptors of a child."""

    stdin: int | None
    stdout: int | None
    stderr: int | None
    pass_fds: Sequence[int]
    start_new_session: bool


def start_python(
    module: str,
    *arguments: str,
    script: bool = False,
    **streams: Unpack[Streams],
) -> Outliving[bytes]:
    """Start a module of pageferry as a child process that imports nothing from the current directory.

    `script`: the module uses only the standard library; it is run as a file without site-packages, and therefore starts
    within a few milliseconds. Raises OSError if the child cannot be started.
    """
    return Outliving(python_command(module, *arguments, script=script), cwd="/", env=_environment(), **streams)


def python_command(module: str, *arguments: str, script: bool = False) -> list[str]:
    """Return the command that `start_python` executes, for a program that starts it later, in `/`."""
    return [sys.executable, *_words(module, script), *arguments]


def _environment() -> dict[str, str]:
    """Return the variables of this process without PYTHON*, and with an absolute run directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if given := kept.get("PAGEFERRY_RUN_DIR"):
        kept["PAGEFERRY_RUN_DIR"] = os.path.abspath(given)
    return kept


def _words(module: str, script: bool) -> list[str]:
    if script:
        return ["-I", "-S", str(_root("pageferry").joinpath(*module.split(".")).with_suffix(".py"))]
    return ["-I", run_module.__file__, json.dumps(_roots()), module]


def _roots() -> list[str]:
    """Return the absolute directories from which pageferry and its dependencies were imported, pageferry's first."""
    names = ["pageferry", *(name for name in _DEPENDENCIES if name in sys.modules)]
    return list(dict.fromkeys(str(_root(name)) for name in names))


def _root(name: str) -> Path:
    file = sys.modules[name].__file__
    assert file is not None
    return Path(file).absolute().parents[name.count(".") + (Path(file).stem == "__init__")]
