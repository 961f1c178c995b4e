"""The QEMUs of this machine: which there are, and whether they run."""

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
    """A QEMU in PATH."""

    path: str
    usable: bool
    """It runs, and says its version."""
    detail: str
    """What it says of itself, or why it does not."""
    version: str | None = None


class QemuSearch:
    """Asks every QEMU in PATH for its version (`-version`), all at once and beside other work."""

    def __init__(self, search_path: str | None = None) -> None:
        """`search_path` as in PATH, which is the default. Starts them; `results` waits for them."""
        self._asked = [(path, _ask(path, "-version")) for path in find_qemus(search_path)]

    def results(self) -> list[Qemu]:
        """Waits a few seconds for each at most."""
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
    """Whether a value follows an option of a QEMU, by its `-help`; None where that does not list it."""
    return _options_of(program).get(option)


@functools.lru_cache
def _options_of(program: str) -> dict[str, bool]:
    """Whether each option takes a value. Descriptions start in column 16, or after two blanks."""
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
    """Executable QEMUs in PATH, in the order of their precedence; links to the same program count once."""
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
        return Qemu(str(path), False, f"did not answer -version within {_DEADLINE:g} s")
    line = next(iter(said.splitlines()), "")
    version = _VERSION.search(line)
    if asked.returncode != 0 or version is None:
        return Qemu(str(path), False, f"-version ended with {asked.returncode}: {line or 'no output'}")
    return Qemu(str(path), True, line, version[1])
