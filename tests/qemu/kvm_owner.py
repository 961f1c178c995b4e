"""Process with a KVM virtual machine that never runs: 4 MiB of memory at 1 MiB, and one vCPU.

The process prints the value of KVM_CAP_PRE_FAULT_MEMORY, and waits for the end of standard input. If KVM refuses to
create the virtual machine, the process prints the error and exits with status 3.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys

_CREATE_VM, _CHECK_EXTENSION, _CREATE_VCPU = 0xAE01, 0xAE03, 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_CAP_PRE_FAULT_MEMORY = 236

LENGTH = 4 << 20
ADDRESS = 1 << 20


def main() -> None:
    memory = mmap.mmap(-1, LENGTH)
    view = ctypes.c_char.from_buffer(memory)
    try:
        machine = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), _CREATE_VM, 0)
        region = struct.pack("=IIQQQ", 0, 0, ADDRESS, LENGTH, ctypes.addressof(view))
        fcntl.ioctl(machine, _SET_USER_MEMORY_REGION, region)
        fcntl.ioctl(machine, _CREATE_VCPU, 0)
    except OSError as error:
        print(error)
        sys.exit(3)
    print(fcntl.ioctl(machine, _CHECK_EXTENSION, _CAP_PRE_FAULT_MEMORY), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
