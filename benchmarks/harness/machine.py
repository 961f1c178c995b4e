"""Requirements of the benchmarks, and a description of the machine."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KERNEL = ROOT / ".cache" / "guest" / "vmlinuz"
QEMU = ROOT / ".cache" / "qemu-10" / "bin" / "qemu-system-x86_64"
NEWEST_QEMU = ROOT / ".cache" / "qemu-11" / "bin" / "qemu-system-x86_64"
"""QEMU of a later Debian release, with the loader and libraries of that release."""
OWN_QEMU = Path("/usr/bin/qemu-system-x86_64")
"""QEMU of the machine's distribution, whose version may differ from that of `QEMU`."""
CHECKER = ROOT / ".cache" / "guest" / "checker"


def require(target: str, *programs: str) -> None:
    """Exit with a message unless all programs and files exist and the process runs as root. `programs`: names in PATH,
    or paths."""
    missing = [str(path) for path in (KERNEL, QEMU) if not path.exists()]
    missing += [one for one in programs if not Path(one).exists() and shutil.which(one) is None]
    if missing or os.geteuid() != 0:
        what = ", ".join(missing) or "what `make system` installs"
        sys.exit(f"{target} requires {what}, and root: run `make system` as root, then repeat the command")


def about() -> dict[str, str]:
    """Return a description of the machine, with the versions of the programs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpus = (line.split(":")[1].strip() for line in lines if "model name" in line)
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / (1 << 20)
    return {
        "CPU": f"{os.cpu_count()} x {next(cpus, platform.machine())}",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "QEMU": qemu_version(QEMU),
        "Python": platform.python_version(),
    }


def described(about: Mapping[str, object]) -> str:
    """Return one line about a run, from `about`, the number of repetitions and the duration in seconds."""
    return ", ".join(f"{'duration in seconds' if key == 'seconds' else key}: {value}" for key, value in about.items())


def qemus() -> dict[str, Path]:
    """Return the available QEMU binaries by version, such as `10.0`, oldest first."""
    found = [path for path in (OWN_QEMU, QEMU, NEWEST_QEMU) if path.exists()]
    return {".".join(qemu_version(path).split(".")[:2]): path for path in found}


def qemu_version(program: Path) -> str:
    """Return the version of a QEMU binary, such as `10.0.2`."""
    said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"version (\S+)", said)
    return version[1] if version else said.strip()
