"""QEMU binaries of this host: paths, versions and options."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

PROGRAM = "qemu-system-x86_64"

_DEADLINE = 3.0
_VERSION = re.compile(r"version (\S+)")
_OPTION = re.compile(r"(?:-h or )?--?([A-Za-z][A-Za-z0-9_-]*)(?=\s|$)")
_DESCRIPTION = 16
"""Column of `-help` in which descriptions start."""


class Qemu(msgspec.Struct, frozen=True, rename="kebab"):
    """QEMU binary in PATH."""

    path: str
    usable: bool
    """Whether the binary runs and prints its version."""
    detail: str
    """First line of its version output, or the reason why it is not usable."""
    version: str | None = None


class QemuSearch:
    """Search that runs every QEMU in PATH with `-version`, all of them in parallel."""

    def __init__(self, search_path: str | None = None) -> None:
        """Start the QEMU binaries; `results` waits for them. `search_path`: directories as in PATH (default: PATH)."""
        self._asked = [(path, _ask(path, "-version")) for path in find_qemus(search_path)]

    def results(self) -> list[Qemu]:
        """Return the result of each binary. Wait at most 3 seconds (`_DEADLINE`) for each."""
        return [_answer(path, asked) for path, asked in self._asked]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, asked in self._asked:
            if isinstance(asked, subprocess.Popen):
                asked.kill()
                asked.communicate()


def option_takes_value(program: str, option: str) -> bool | None:
    """Return whether an option of the QEMU binary `program` takes a value, according to its `-help` output.

    None if the output does not list the option.
    """
    return _options_of(program).get(option)


@functools.lru_cache
def _options_of(program: str) -> dict[str, bool]:
    """Return, for each option, whether it takes a value. Descriptions start in column 16, or after two blanks."""
    asked = _ask(program, "-help")
    if isinstance(asked, OSError):
        return {}
    with asked:
        try:
            said, _ = asked.communicate(timeout=_DEADLINE)
        except subprocess.TimeoutExpired:
            asked.kill()
            return {}
    found = {}
    for line in said.splitlines():
        if (option := _OPTION.match(line)) is None:
            continue
        rest = line[option.end() :]
        within = line[option.end() : _DESCRIPTION].strip() != ""
        found[option[1]] = within if option.end() < _DESCRIPTION else bool(re.match(r" \S", rest))
    return found


def find_qemus(search_path: str | None = None) -> list[Path]:
    """Return the QEMU binaries in PATH, in order of precedence. Links to the same program count once."""
    folders = (os.environ.get("PATH", os.defpath) if search_path is None else search_path).split(os.pathsep)
    candidates = (Path(folder or ".") / PROGRAM for folder in folders)
    by_program: dict[str, Path] = {}
    for path in candidates:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            by_program.setdefault(os.path.realpath(path), path)
    return list(by_program.values())


def _ask(path: Path | str, option: str) -> subprocess.Popen[str] | OSError:
    try:
        return subprocess.Popen(
            [path, option],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as refused:
        return refused


def _answer(path: Path, asked: subprocess.Popen[str] | OSError) -> Qemu:
    if isinstance(asked, OSError):
        return Qemu(str(path), False, f"cannot be started: {asked.strerror}")
    try:
        said, _ = asked.communicate(timeout=_DEADLINE)
    except subprocess.TimeoutExpired:
        return Qemu(str(path), False, f"did not reply to -version within {_DEADLINE:g} s")
    line = next(iter(said.splitlines()), "")
    version = _VERSION.search(line)
    if asked.returncode != 0 or version is None:
        return Qemu(str(path), False, f"-version exited with code {asked.returncode}: {line or 'no output'}")
    return Qemu(str(path), True, line, version[1])
