"""Limit on the CPU time of processes, set in their control group. The limit ends with the process that has set it.

If the cpu controller belongs to cgroup v1, the processes are moved to a child of their group. In cgroup v2, a group
with processes cannot have children with controllers. The group of the processes itself is therefore limited, and must
not contain other processes. A guardian process (`guardian`) restores the groups, even if this process is killed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pageferry.errors import WorkloadError
from pageferry.host import proc
from pageferry.host.guardian import Action, EmptyGroup, Guardian, WriteFile

PERIOD = 100_000
"""Period of a limit, microseconds; the default of the kernel."""
MIN_QUOTA = 1000
"""Minimum limit that the kernel accepts, microseconds per period."""
TIMEOUT = 10.0
"""Seconds to wait for the guardian to exit."""


@dataclass(frozen=True, slots=True)
class Mount:
    """Mounted file system of control groups."""

    version: int
    root: bytes
    """Group that is shown at the root of the mount."""
    point: Path
    controllers: frozenset[str]
    """Controllers of version 1; empty in version 2, where each group has its own controllers."""


def mounts() -> Iterator[Mount]:
    """Yield the mounted file systems of control groups (/proc/self/mountinfo)."""
    for line in proc.lines(Path("/proc/self/mountinfo").read_bytes()):
        # The file system's source, between type and options, may be empty or a hyphen.
        before, _, after = line.partition(b" - ")
        fields, (kind, _, options) = before.split(b" "), after.split(b" ")
        if kind in (b"cgroup", b"cgroup2"):
            point = Path(os.fsdecode(_unescaped(fields[4])))
            controllers = frozenset(os.fsdecode(options).split(","))
            yield Mount(2 if kind == b"cgroup2" else 1, _unescaped(fields[3]), point, controllers)


def _unescaped(path: bytes) -> bytes:
    """Decode the octal escapes of blanks, newlines and backslashes."""
    return re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), path)


class CpuQuota:
    """Limit on the total CPU time of processes, until `close` or the exit of this process.

    The constructor raises WorkloadError, with the reason, if no limit can be set, and WorkloadDied if a process has
    exited.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        if os.getpid() in pids:
            raise WorkloadError(
                "cannot limit the CPU time of the workload: it runs in this process; migrate it from another process"
            )
        version, group = _group_of(pids)
        if version == 1:
            self._limited = group / f"pageferry-{os.getpid()}-{os.urandom(4).hex()}"
            undo: Action = EmptyGroup(str(self._limited), str(group))
            self._file = self._limited / "cpu.cfs_quota_us"
            self._none = "-1"
        else:
            _alone(group, pids)
            self._file = group / "cpu.max"
            self._none = _read(self._file)
            undo = WriteFile(str(self._file), self._none)
        self.where = f"cgroup v{version}, {group}"
        """cgroup version, and name of the control group of the processes; human-readable."""
        self._version = version
        self._guardian = Guardian(f"the CPU limit of {group}")
        self._guardian.plan([undo])
        try:
            if version == 1:
                self._move(pids)
            self.lift()
        except OSError as error:
            self.close()
            raise WorkloadError(
                f"cannot limit the CPU time of the workload: {error.filename or group}: {error.strerror}"
            ) from error

    def limit(self, cpus: float) -> None:
        """Limit the processes together to `cpus` CPUs. Raises WorkloadError if the kernel refuses the limit."""
        quota = max(int(cpus * PERIOD), MIN_QUOTA)
        try:
            _write(self._file, str(quota) if self._version == 1 else f"{quota} {PERIOD}")
        except OSError as error:
            raise WorkloadError(f"cannot limit the CPU time of the workload: {self._file}: {error.strerror}") from error

    def lift(self) -> None:
        """Remove the limit until the next call of `limit`. Raises OSError."""
        _write(self._file, self._none)

    def close(self) -> None:
        """Restore the groups: close the guardian, which undoes the changes, and wait for its exit."""
        with suppress(OSError):  # the group has been removed, because its processes have exited
            self.lift()
        with suppress(TimeoutError):
            self._guardian.finish(TIMEOUT)

    def _move(self, pids: Sequence[int]) -> None:
        self._limited.mkdir()
        _write(self._limited / "cpu.cfs_period_us", str(PERIOD))
        for pid in pids:
            _write(self._limited / "cgroup.procs", str(pid))


def _group_of(pids: Sequence[int]) -> tuple[int, Path]:
    """Return the cgroup version, and the directory of the control group that has a cpu controller and contains all of
    the processes. Raises WorkloadError if there is none."""
    found = {_place(pid) for pid in pids}
    if len(found) != 1:
        raise WorkloadError(
            "cannot limit the CPU time of the workload: its processes are in different control groups; start them in "
            "one group"
        )
    return found.pop()


def _place(pid: int) -> tuple[int, Path]:
    lines = proc.lines(proc.read(pid, "cgroup"))
    for mount in mounts():
        root = Path(os.fsdecode(mount.root))
        for line in lines:
            _, controllers, name = line.split(b":", 2)
            path = Path(os.fsdecode(name))
            named = b"cpu" in controllers.split(b",") if mount.version == 1 else not controllers
            shown = path.is_relative_to(root)
            if not (named and shown) or (mount.version == 1 and "cpu" not in mount.controllers):
                continue
            group = mount.point / path.relative_to(root)
            if mount.version == 1 or (group / "cpu.max").exists():
                return mount.version, group
    raise WorkloadError(
        f"cannot limit the CPU time of process {pid}: no visible control group with the cpu controller contains it; "
        "see `pageferry check`, cpu-quota"
    )


def _alone(group: Path, pids: Sequence[int]) -> None:
    others = set(_read(group / "cgroup.procs").split()) - {str(pid) for pid in pids}
    if others:
        raise WorkloadError(
            f"cannot limit the CPU time of the workload: {len(others)} other processes are in its control group "
            f"{group}; start the workload in a separate group"
        )


def _read(path: Path) -> str:
    return path.read_text().strip()


def _write(path: Path, text: str) -> None:
    """Write a text with one write(2), as files of control groups require."""
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(file)
