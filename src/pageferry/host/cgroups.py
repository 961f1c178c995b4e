"""Control groups of processes that write to memory of another process: the kernel charges the group of the writer."""

from __future__ import annotations

import os
from pathlib import Path

from pageferry.host import proc
from pageferry.host.cpu_quota import Mount, mounts

_V1 = {"memory", "name=systemd"}
"""Hierarchies of version 1 to join: memory, which charges pages, and name=systemd, by which systemd ends sessions."""


def join_groups_of(pid: int) -> list[str]:
    """Move this process to the control groups of process `pid`. Return the failures, as `GROUP: ERROR`.

    The kernel then charges shared memory that this process allocates to the groups of process `pid`. The end of this
    process's login session no longer kills this process. The move requires root, or permission to write to the groups
    of both processes.
    """
    failures = []
    ours, theirs = (proc.lines(proc.read(process, "cgroup")) for process in (os.getpid(), pid))
    for mount in mounts():
        group = _group(mount, theirs)
        if group is not None and group != _group(mount, ours):
            try:
                _join(group)
            except OSError as error:
                failures.append(f"{group}: {error.strerror}")
    return failures


def _group(mount: Mount, lines: list[bytes]) -> Path | None:
    """Return the directory of a process's group in the hierarchy of `mount`. `lines`: /proc/PID/cgroup of the process.

    Return None if the hierarchy is irrelevant, or if the mount does not show the group.
    """
    if mount.version == 1 and not mount.controllers & _V1:
        return None
    for line in lines:
        _, controllers, name = line.split(b":", 2)
        named = os.fsdecode(controllers) in mount.controllers if mount.version == 1 else not controllers
        path, root = Path(os.fsdecode(name)), Path(os.fsdecode(mount.root))
        if named and path.is_relative_to(root):
            return mount.point / path.relative_to(root)
    return None


def _join(group: Path) -> None:
    file = os.open(group / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, b"0")
    finally:
        os.close(file)
