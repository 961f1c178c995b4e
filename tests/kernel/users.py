"""Commands that root runs as one of four kinds of user: `python -m tests.kernel.users KIND PYTHON ARGUMENTS...`.

- `root`: root itself
- `user`: an ordinary user without capabilities
- `sandbox`: uid 0 with the default capabilities of a container and a private /dev; a seccomp filter denies userfaultfd
  and all access to other processes
- `bare`: as `sandbox`, without capabilities
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import pageferry
from tests.kernel.moving import Host, environment
from tests.kernel.probing import deny

ROOT = Path(__file__).parent.parent.parent
KINDS = ("root", "user", "sandbox")
UID = 65534

_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 1 << 18
_PR_CAPBSET_DROP = 24
_CONTAINER_CAPABILITIES = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}
_USERFAULTFD = 323
_REFUSED = {
    "ptrace": 101, "mount": 165, "process_vm_readv": 310, "process_vm_writev": 311, "userfaultfd": _USERFAULTFD,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "pidfd_getfd": 438, "process_madvise": 440,
}  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


def python() -> str:
    """Return the path of a Python interpreter that every user may execute. Skip the test if there is none."""
    for found in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")):
        if found is not None and _works(found):
            return found
    pytest.skip("no Python interpreter of this version that an ordinary user may execute")


def _works(path: str) -> bool:
    """Return whether an ordinary user may execute a Python interpreter of the same version as this interpreter."""
    command = [path, "-I", "-c", f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"]
    with contextlib.suppress(PermissionError):
        return (
            subprocess.run(command, capture_output=True, user=UID, group=UID, extra_groups=[], cwd="/").returncode == 0
        )
    return False


def host(kind: str, folder: Path) -> Host:
    """Return a host whose programs run as a kind of user, and whose run directory is in `folder`."""
    return Host((sys.executable, "-m", "tests.kernel.users", kind), folder / "run")


def run(kind: str, folder: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python as a kind of user for at most `timeout` seconds, and return the completed process."""
    here = host(kind, folder)
    command = [*here.within, sys.executable, *arguments]
    return subprocess.run(
        command, timeout=timeout, check=False, capture_output=True, text=True, env=environment(None, here), cwd=ROOT
    )


def _become(kind: str) -> None:
    if kind == "user":
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)
    elif kind in ("sandbox", "bare"):
        _own_dev()
        for capability in set(range(64)) - (_CONTAINER_CAPABILITIES if kind == "sandbox" else set()):
            _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        deny(dict.fromkeys(_REFUSED.values(), errno.EPERM))


def _own_dev() -> None:
    """Mount a private /dev with the devices of a container, without /dev/userfaultfd and /dev/kvm."""
    if _libc.unshare(_CLONE_NEWNS) or _libc.mount(None, b"/", None, _MS_REC_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "unshare")
    if _libc.mount(b"tmpfs", b"/dev", b"tmpfs", 0, b"mode=0755"):
        raise OSError(ctypes.get_errno(), "mount")
    for name, minor in (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)):
        os.mknod(f"/dev/{name}", 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        os.chmod(f"/dev/{name}", 0o666)
    os.mkdir("/dev/shm")


def main(arguments: Sequence[str]) -> None:
    """Change to a kind of user, and execute, with our packages, a Python interpreter that this user may execute."""
    kind, _, *words = arguments
    found = python()
    packages = [
        str(ROOT),
        str(Path(pageferry.__file__).parents[1]),
        *(path for path in sys.path if "site-packages" in path),
    ]
    os.environ["PYTHONPATH"] = os.pathsep.join(packages)
    _become(kind)
    os.execv(found, [found, *words])


if __name__ == "__main__":
    main(sys.argv[1:])
