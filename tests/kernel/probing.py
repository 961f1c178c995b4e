"""Processes that probe features: as an ordinary user, with denied system calls, or with misbehaving probes.

python -m tests.kernel.probing features [USER]      check_features() and the privileges of this user or of USER, as JSON
python -m tests.kernel.probing denied CALL=ERRNO,... ARGUMENTS...     pageferry ARGUMENTS; each CALL fails with ERRNO
python -m tests.kernel.probing misbehaving          probes that hang, crash, fail or return invalid results
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from pageferry.cli.main import main
from pageferry.host.probes import Feature, Probe, Unavailable, check_features

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000
_CALLS = {"userfaultfd": 323, "unused": 1000}
_libc = ctypes.CDLL(None, use_errno=True)


class Seen(msgspec.Struct):
    """Features that a process has found, and the privileges of the process."""

    features: dict[str, Feature]
    capabilities: int
    """Effective capabilities, a bitmap (CapEff of proc(5))."""
    opens_kvm: bool
    starts_ksm: bool


def features(user: int | None) -> None:
    check_features()  # loads lazily imported modules, which `user` may be unable to read
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        # After setresuid(2) the process is not dumpable, so the new user may not trace it. Make it dumpable again.
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    status = Path("/proc/self/status").read_text().splitlines()
    seen = Seen(
        features=check_features(),
        capabilities=int(next(line for line in status if line.startswith("CapEff:")).split()[1], 16),
        opens_kvm=os.access("/dev/kvm", os.R_OK | os.W_OK),
        starts_ksm=os.access("/sys/kernel/mm/ksm/run", os.W_OK),
    )
    sys.stdout.write(msgspec.json.encode(seen).decode())


def deny(calls: dict[int, int]) -> None:
    """Install a seccomp filter that makes system calls fail. `calls`: errno by system call number."""
    program = [struct.pack("=HBBI", 0x20, 0, 0, 0)]  # load the system call number
    for number, error in calls.items():
        program.append(struct.pack("=HBBI", 0x15, 0, 1, number))  # skip the next instruction unless equal
        program.append(struct.pack("=HBBI", 0x06, 0, 0, 0x00050000 | error))  # return the errno
    program.append(struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))  # allow
    code = ctypes.create_string_buffer(b"".join(program))
    filter_ = struct.pack("@HP", len(program), ctypes.addressof(code))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc.prctl(_PR_SET_SECCOMP, 2, filter_, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def hide_device() -> None:
    """Mount a private /dev with the same character devices except userfaultfd. Requires root."""
    devices = {path: path.stat() for path in Path("/dev").iterdir() if path.is_char_device()}
    _check(_libc.unshare(_CLONE_NEWNS))
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _check(_libc.mount(b"none", b"/dev", b"tmpfs", 0, None))
    for path, status in devices.items():
        if path.name != "userfaultfd":
            os.mknod(path, status.st_mode, status.st_rdev)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _dies() -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "survived"


def _hangs_with_a_child() -> str:
    child = subprocess.Popen(["sleep", "1000"])
    Path(os.environ["CHILD_FILE"]).write_text(str(child.pid))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)
    return "woke up"


def _exits() -> str:
    os._exit(0)


def _errs() -> str:
    raise ZeroDivisionError("mistake")


def _refused() -> str:
    return str(os.stat("/nowhere"))


def _unavailable() -> str:
    raise Unavailable("not here", remedy="go elsewhere")


def _writes() -> str:
    sys.stdout.write("noise")
    sys.stdout.flush()
    os.write(2, b"noise")
    return "wrote"


def misbehaving() -> None:
    attempts = (_dies, _hangs_with_a_child, _exits, _errs, _refused, _unavailable, _writes)
    probes = [Probe(attempt.__name__.strip("_"), attempt, "the remedy") for attempt in attempts]
    sys.stdout.write(msgspec.json.encode(check_features(probes, deadline=2.0)).decode())


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    match what:
        case "features":
            features(int(words[0]) if words else None)
        case "denied":
            calls = dict(pair.split("=") for pair in words[0].split(","))
            if "userfaultfd" in calls:
                hide_device()
            deny({_CALLS[call]: int(error) for call, error in calls.items()})
            sys.exit(main(words[1:]))
        case "misbehaving":
            misbehaving()
