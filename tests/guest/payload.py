"""Build of `payload.rs`, the guest without an operating system, which runs on TCG and on KVM."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tests.guest.compiler import compile_program

SOURCE = Path(__file__).with_name("payload.rs")

_CREATE_VM = 0xAE01
_LINKED = ("-Crelocation-model=static", "-Clinker=ld", "-Clinker-flavor=ld", "-Clink-args=-static")
_PLACED = ("-Clink-arg=-Ttext-segment=0x100000", "-Clink-args=-e start", "-Cstrip=symbols")


def build(folder: Path) -> Path:
    """Compile and link the payload to run at 1 MiB. Return the file for QEMU's `-kernel`."""
    return compile_program(SOURCE, folder / "payload", *_LINKED, *_PLACED)


def obstacle(accel: str) -> str | None:
    """Return the reason why an accelerator cannot be used on this host; None if it can be used."""
    if accel != "kvm":
        return None
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"cannot open /dev/kvm: {error.strerror}"
    try:
        os.close(fcntl.ioctl(device, _CREATE_VM, 0))
    except OSError as error:
        return f"KVM cannot create a virtual machine: {error.strerror}"
    finally:
        os.close(device)
    return None


def main() -> None:
    """Print the command line of QEMU for the payload on TCG, without its serial line and its memory size."""
    cache = Path(__file__).parents[2] / ".cache"
    qemu = cache / "qemu-10/bin/qemu-system-x86_64"
    program = str(qemu) if qemu.exists() else "qemu-system-x86_64"
    kernel = build(cache / "guest/payload")
    print(program, "-accel", "tcg", "-display", "none", "-nodefaults", "-kernel", kernel, "-append", "ferry.mib=16")


if __name__ == "__main__":
    main()
