"""Compilation of the programs that run in test guests, with rustc alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def compile_program(source: Path, program: Path, *options: str) -> Path:
    """Compile a single-file program unless `program` is newer than `source`. Return `program`.

    Raises FileNotFoundError if rustc is not installed, CalledProcessError if the compilation fails.
    """
    program.parent.mkdir(parents=True, exist_ok=True)
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        temporary = program.with_suffix(f".{os.getpid()}")
        command = ["rustc", "--edition=2024", "-O", "-Cpanic=abort", *options, "-o", str(temporary), str(source)]
        subprocess.run(command, check=True)
        temporary.rename(program)
    return program
