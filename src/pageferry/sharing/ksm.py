"""Runs of kernel same-page merging (KSM) on chosen ranges: start, monitor and stop KSM, and restore its settings.

See Documentation/admin-guide/mm/ksm.rst. Merged pages stay merged when KSM is stopped (`run` = 0). KSM is one service
for the whole machine. This module refuses to use it if another process does, and a guardian process restores the
settings if this process exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pageferry.errors import UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.host.guardian import Guardian, WriteFile

FOLDER = Path("/sys/kernel/mm/ksm")
SWITCHES = {
    "advisor_mode": "none",  # otherwise pages_to_scan cannot be set (Linux 6.8)
    "sleep_millisecs": "0",
    "pages_to_scan": "4096",
    "smart_scan": "0",  # smart_scan skips pages that did not merge, for longer each time (Linux 6.7)
    "use_zero_pages": "1",  # pages of zeros are freed without a copy, and are the same for all processes anyway
    "run": "1",
}
"""Settings for a run, applied in this order if the kernel has them."""
QUIET_SCANS, GAIN = 2, 1.01
"""Number of consecutive full scans that merge less than 1 % more pages (`GAIN`), after which KSM is stopped. A page
must be unchanged in two scans, and a huge page of identical pages is split in one scan and merged in the next."""
MAX_SCANS, TIMEOUT = 12, 300.0
"""Limits of a run, in full scans and in seconds, for a workload that writes to merged pages as fast as they are
merged."""


@dataclass(frozen=True, slots=True)
class Run:
    """Statistics of a run of KSM."""

    scans: int
    cpu: float
    """CPU time of ksmd, seconds."""


def pages_per_copy() -> int:
    """Return the maximum number of pages that share one copy (`max_page_sharing`)."""
    try:
        return int(_read("max_page_sharing"))
    except (OSError, ValueError):
        return 256


def check_unused(pids: Collection[int], *, merge_with_others: bool = False) -> None:
    """Raise UnsupportedError if KSM is missing, not permitted, or used by a process other than `pids`.

    Other processes may have offered memory to KSM while it is stopped (QEMU does so with private memory, unless run
    with `mem-merge=off`). KSM would merge this memory with that of `pids`. `merge_with_others` allows this.
    """
    if not os.access(FOLDER / "run", os.W_OK):
        raise UnsupportedError(
            f"cannot use KSM for anonymous memory: {FOLDER}/run does not exist or is not writable; run as root on a "
            "kernel with KSM"
        )
    if _read("run") != "0":
        raise UnsupportedError(
            f"cannot use KSM: it is already enabled ({FOLDER}/run is {_read('run')}); write 0 to that file to let "
            "pageferry control it"
        )
    if not Path("/proc/self/ksm_stat").exists() and int(_read("pages_shared")):
        raise UnsupportedError(
            "cannot use KSM: it has already merged pages, and this kernel does not report which processes they "
            "belong to; run `pageferry sharing` without --apply, or use Linux 6.1 or later"
        )
    others = [] if merge_with_others else [pid for pid in _users() if pid not in pids]
    if others:
        names = ", ".join(f"{pid} ({_command(pid)})" for pid in others[:4])
        raise UnsupportedError(
            f"cannot use KSM: other processes have mergeable memory: {names}; add them as pid:N, or set "
            "`merge_with_others` to merge their pages with those of the given workloads"
        )


async def run_once() -> Run:
    """Run KSM until `QUIET_SCANS` or a limit of the run is reached, then stop it and restore its settings. Return the
    statistics. Raises WorkloadError if the guardian does not start, or if the settings cannot be restored."""
    with _running():
        begin_cpu, deadline = _ksmd_seconds(), time.monotonic() + TIMEOUT
        first = last = int(_read("full_scans"))
        merged, quiet = _merged(), 0
        while quiet < QUIET_SCANS and last - first < MAX_SCANS and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            scans = int(_read("full_scans"))
            if scans > last:
                now = _merged()
                # The first scans only record checksums of pages, and drop those of processes that have exited.
                quiet = quiet + scans - last if now <= GAIN * merged and last > first + 2 else 0
                merged, last = now, scans
        return Run(last - first, _ksmd_seconds() - begin_cpu)


@contextmanager
def _running() -> Iterator[None]:
    """Start KSM, and restore all settings on exit, even if this process is killed."""
    before = {name: _read(name).strip("[]") for name in SWITCHES if (FOLDER / name).exists()}
    if "advisor_mode" in before:
        before["advisor_mode"] = _chosen(_read("advisor_mode"))
    guardian = Guardian("the settings of KSM")
    try:
        if not guardian.confirm():
            raise WorkloadError("cannot use KSM: the guardian process of its settings did not start; retry")
        guardian.plan([WriteFile(str(FOLDER / name), value) for name, value in undo_order(before)])
        for name in before:
            (FOLDER / name).write_text(SWITCHES[name])
        yield
    finally:
        if not guardian.finish():  # the guardian restores them now, as it would if this process exited
            raise WorkloadError(
                f"cannot restore the settings of KSM in {FOLDER}: the guardian process has failed; write {before} there"
            )


def undo_order(switches: dict[str, str]) -> list[tuple[str, str]]:
    """Return the settings in the order in which to restore them: `run` first, which stops KSM, and `advisor_mode`
    last."""
    first, last = [("run", switches["run"])], [("advisor_mode", switches.get("advisor_mode", ""))]
    rest = [(name, value) for name, value in switches.items() if name not in ("run", "advisor_mode")]
    return first + rest + (last if "advisor_mode" in switches else [])


def _chosen(text: str) -> str:
    """Return the selected value of a setting: `scan-time` for `none [scan-time]`."""
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else text


def _merged() -> int:
    """Return the number of merged pages, including the shared copies and pages of zeros."""
    names = ("pages_sharing", "pages_shared", "ksm_zero_pages")
    return sum(int(_read(name)) for name in names if (FOLDER / name).exists())


def _users() -> Iterator[int]:
    """Yield the pids of processes that have offered memory to KSM (/proc/PID/ksm_stat, Linux 6.1)."""
    for pid in proc.pids():
        with contextlib.suppress(OSError, WorkloadDied):
            lines = proc.lines(proc.read(pid, "ksm_stat"))
            if _offers(dict(line.replace(b":", b"").split(maxsplit=1) for line in lines)):
                yield pid


def _offers(stat: dict[bytes, bytes]) -> bool:
    if b"ksm_mergeable" in stat:  # Linux 6.16
        return b"yes" in (stat[b"ksm_mergeable"], stat.get(b"ksm_merge_any"))
    return int(stat.get(b"ksm_rmap_items", b"0")) > 0


def _command(pid: int) -> str:
    try:
        return proc.command(pid)
    except (OSError, WorkloadDied):
        return "exited"


def _ksmd_seconds() -> float:
    """Return the CPU time of ksmd so far, seconds."""
    global _ksmd
    if _ksmd is None:
        _ksmd = next((pid for pid in proc.pids() if proc.kernel_thread(b"ksmd", pid)), 0)
    try:
        stat = proc.read(_ksmd, "schedstat")
    except (OSError, WorkloadDied):
        return 0.0
    return int(stat.split()[0]) / 1e9


_ksmd: int | None = None


def _read(name: str) -> str:
    return (FOLDER / name).read_text().strip()
