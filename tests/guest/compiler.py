"""Compilation, with rustc and without cargo, of the programs that run in test guests."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path


def compile_program(source: Path, program: Path, *options: str) -> Path:
    """Compile a single-file program unless `program` is newer than `source`. Return `program`.

    Raises FileNotFoundError if rustc is not installed, CalledProcessError if the compilation fails.
    """
    program.parent.mkdir(parents=True, exist_ok=True)
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        # rustc also creates its intermediate files here. Their names are the same in every process.
        with tempfile.TemporaryDirectory(dir=program.parent) as folder:
            temporary = Path(folder) / program.name
            command = ["rustc", "--edition=2024", "-O", "-Cpanic=abort", *options, "-o", str(temporary), str(source)]
            subprocess.run(command, check=True)
            temporary.rename(program)
    return program
