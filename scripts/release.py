"""Build the source distribution and the wheel of a release in dist/, test the wheel, and write checksums.

The wheel contains a stripped engine for all supported versions of CPython (abi3). It runs on distributions with glibc
2.28 or newer (manylinux_2_28), because the compiler of the ziglang package links the engine against that version. The
wheel also contains man pages, completions and a list of its components (SBOM, CycloneDX).

Tests of the wheel: glibc version and libraries (auditwheel), size, and contents; then an installation into an empty
virtual environment for each supported Python of this machine, in which an arena is saved and restored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".cache" / "release"
DIST = ROOT / "dist"
PLATFORM = "manylinux_2_28"
MAX_SIZE = 8_000_000
"""Maximum size of the wheel in bytes."""
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")

TRIAL = """
import tempfile, pageferry
with pageferry.Arena(4 << 20) as arena, tempfile.TemporaryDirectory() as folder:
    memoryview(arena)[:5] = b"saved"
    pageferry.checkpoint(arena, f"{folder}/trial.img")
    with pageferry.restore(f"{folder}/trial.img") as again:
        assert bytes(memoryview(again)[:5]) == b"saved"
"""


def main() -> None:
    """Build and test the packages. Exits with a message if a package is not fit for a release."""
    tools = _environment(
        TOOLS, ["--require-hashes", "--only-binary", ":all:", "-r", str(ROOT / "requirements-release.lock")]
    )
    shutil.rmtree(DIST, ignore_errors=True)
    _build(tools)
    (wheel,) = DIST.glob("*.whl")
    _check_platform(tools, wheel)
    _check_contents(wheel)
    tried = [name for name in PYTHONS if _try(name, wheel)]
    if not tried:
        sys.exit(f"cannot test {wheel.name}: none of {', '.join(PYTHONS)} is installed")
    _write_checksums()
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, tested with {', '.join(tried)}")


def _environment(path: Path, packages: list[str], python: str = sys.executable) -> Path:
    """Create a virtual environment with these packages (arguments of `pip install`). Return its directory of
    programs."""
    subprocess.run([python, "-m", "venv", "--clear", path], check=True)
    programs = path / "bin"
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", *packages], check=True)
    return programs


def _build(tools: Path) -> None:
    """Build the source distribution, and build the wheel from it. This proves that the source distribution is
    complete."""
    search = os.pathsep.join([str(tools), os.environ["PATH"]])
    options = ["--release", "--locked", "--strip", "--zig", "--compatibility", PLATFORM, "--auditwheel", "check"]
    command = [str(tools / "maturin"), "build", "--sdist", *options, "--out", str(DIST)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PATH": search})


def _check_platform(tools: Path, wheel: Path) -> None:
    """Check that the wheel can run on all distributions that its name claims."""
    shown = subprocess.run([tools / "auditwheel", "show", wheel], check=True, capture_output=True, text=True).stdout
    if f'"{PLATFORM}_x86_64"' not in shown:
        sys.exit(f"{wheel.name} does not run on all distributions with {PLATFORM}:\n{shown}")


def _check_contents(wheel: Path) -> None:
    """Check the size, the required files and the component list of the wheel."""
    size = wheel.stat().st_size
    if size > MAX_SIZE:
        sys.exit(f"{wheel.name} has {size:,} bytes, more than {MAX_SIZE:,}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for end in ("/py.typed", "/man1/pageferry.1", "/completions/pageferry", "/licenses/LICENSE", "/METADATA"):
            if not any(name.endswith(end) for name in names):
                sys.exit(f"{wheel.name} does not contain a file {end[1:]!r}")
        if not any(_components(archive, name) for name in names if "/sboms/" in name):
            sys.exit(f"{wheel.name} contains no list of its components")


def _components(archive: zipfile.ZipFile, name: str) -> list[object]:
    """Return the components that an SBOM file of the wheel lists."""
    return list(json.loads(archive.read(name)).get("components", []))


def _try(python: str, wheel: Path) -> bool:
    """Install the wheel into an empty environment, and save and restore an arena. Return False if this machine does not
    have this Python."""
    found = next(_interpreters(python), None)
    if found is None:
        print(f"{python}: not installed, not tested")
        return False
    with tempfile.TemporaryDirectory() as folder:
        programs = _environment(Path(folder), ["--only-binary", ":all:", str(wheel)], found)
        subprocess.run([programs / "pageferry", "--version"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([programs / "python", "-W", "error", "-c", TRIAL], check=True)
    return True


def _interpreters(name: str) -> Iterator[str]:
    """Yield the programs of this name in PATH that can create virtual environments."""
    for folder in os.environ["PATH"].split(os.pathsep):
        program = Path(folder) / name
        if program.exists():
            done = subprocess.run([program, "-c", "import venv, ensurepip"], check=False, capture_output=True)
            if done.returncode == 0:
                yield str(program)


def _write_checksums() -> None:
    """Write SHA256SUMS, in the format of `sha256sum --check`."""
    packages = sorted(path for path in DIST.iterdir() if path.name.startswith("pageferry-"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in packages]
    (DIST / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    main()
