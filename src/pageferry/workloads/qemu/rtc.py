"""Real-time clock (RTC) of a guest: the clock of the host that it follows, and its time after a restore.

QEMU's option `-rtc clock=` selects this clock: `host` (the default: the wall clock), `rt` (the monotonic clock of the
host) or `vm` (stops while the guest is paused). A device state contains the time of the RTC, and the value of the
selected clock at that time. On load, a QEMU with the same clock adds the time that has passed on this clock:

- `host`: the time since the snapshot point. The RTC is correct if it was correct at the snapshot point.
- `vm`: nothing, because the device state contains this clock. The RTC continues from the snapshot point.

With `rt`, QEMU ignores the saved value of the clock, and the RTC continues from the snapshot point. A state that was
saved with `host` can therefore be loaded with `rt`. Any other change of the clock would shift the RTC by decades,
because the clocks have different zero points; QEMU does not check this.

`-rtc base=` has no effect on a guest whose state is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pageferry.errors import UsageError, WorkloadError
from pageferry.host import proc
from pageferry.workloads.qemu.option_syntax import properties

Clock = Literal["host", "image"]

DETAIL = "rtc-clock"
"""Detail of an identity: clock of the RTC, a value of `-rtc clock=`."""

_DEFAULT = "host"
_RESETS = "rt"
"""Clock with which QEMU ignores the saved value of the clock."""


def clock_of(arguments: Sequence[str]) -> str:
    """Return the clock of the RTC in a QEMU command line, which need not be valid."""
    clock = _DEFAULT
    for word, value in itertools.pairwise(arguments):
        if word in ("-rtc", "--rtc"):
            clock = properties(value, "base").get("clock", clock)
    return clock


def clock_of_process(pid: int) -> str:
    """Return the clock of the RTC of a QEMU process. Raises WorkloadDied."""
    return clock_of(proc.arguments(pid))


def choose(choice: Clock, details: Mapping[str, Any], path: str) -> list[str]:
    """Return the QEMU options for a restore. `details`: details of the image at `path`.

    Raises UsageError if the RTC cannot be set to the chosen time.
    """
    saved = str(details.get(DETAIL, _DEFAULT))
    if choice == "image":
        return ["-rtc", f"clock={saved if saved == 'vm' else _RESETS}"]
    if saved != "host":
        raise UsageError(
            f"cannot set the RTC to the time of the host: {path} was saved with -rtc clock={saved}, and QEMU can only "
            "continue from the time in the image; use --clock image, and set the clock in the guest"
        )
    return ["-rtc", "clock=host"]


def check_migration(details: Mapping[str, Any], own: str, here: str) -> None:
    """Raise WorkloadError if the RTC of a guest would follow another clock at the destination. `details`: details of
    the source. `own`: clock at the destination. `here`: name of the destination, for error messages."""
    expected = details.get(DETAIL, own)
    if own != expected:
        raise WorkloadError(
            f"the clocks of the RTC do not match: the source has -rtc clock={expected}, {here} has clock={own}; start "
            "the destination with the options of the source"
        )


def check_restored(details: Mapping[str, Any], own: str, path: str) -> None:
    """Raise WorkloadError if the RTC would have a wrong time after the restore of an image with these details. `own`:
    clock of the guest, which has not run yet."""
    saved = details.get(DETAIL, own)
    if own not in (saved, _RESETS):
        raise WorkloadError(
            f"cannot set the RTC: {path} was saved with -rtc clock={saved}, and the command line has "
            f"clock={own}; use --clock image"
        )
