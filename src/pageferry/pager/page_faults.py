"""Permission to handle page faults of a process, including those of its system calls and of KVM.

This permission is required to load memory on demand: lazy restore (S10), post-copy (S8), cold stores (S3). Without it,
a system call that accesses a deferred page would fail with EFAULT, so these operations are refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping

from pageferry._engine import Space
from pageferry.errors import UnsupportedError


class CannotHandleFaults(UnsupportedError):
    """Error for a process whose page faults cannot be handled: permissions or kernel support are missing."""


def userfaults(spaces: Mapping[int, Space], *, discards: bool = True) -> tuple[dict[int, int], dict[int, int]]:
    """Create a userfaultfd in each process. Return, by pid, the descriptors in this process, and the numbers of the
    descriptors that the processes keep.

    With `discards`, the userfaultfds report discarded ranges. Raises CannotHandleFaults or ProcessLookupError; after an
    error, no descriptor is left in any process.
    """
    ours: dict[int, int] = {}
    kept: dict[int, int] = {}
    try:
        for pid, space in spaces.items():
            made = space.missing_faults(discards=discards)
            ours[pid] = made.descriptor
            if made.number is not None:
                kept[pid] = made.number
    except ProcessLookupError:
        close(spaces, ours, kept)
        raise
    except OSError as refused:
        close(spaces, ours, kept)
        raise _cannot(pid, refused) from refused
    return ours, kept


def open_spaces(pids: Iterable[int]) -> dict[int, Space]:
    """Open the address spaces of processes. Raises CannotHandleFaults if a process cannot be traced, ProcessLookupError
    if it has exited."""
    spaces = {}
    for pid in pids:
        try:
            spaces[pid] = Space(pid)
        except ProcessLookupError:
            raise
        except OSError as refused:
            raise _cannot(pid, refused) from refused
    return spaces


def check(pids: Iterable[int]) -> None:
    """Raise CannotHandleFaults if page faults of these processes cannot be handled. Leave no descriptors in them."""
    spaces = open_spaces(pids)
    close(spaces, *userfaults(spaces))


def close(spaces: Mapping[int, Space], ours: Mapping[int, int], kept: Mapping[int, int]) -> None:
    """Close the descriptors that `userfaults` returned, in this process and in the processes of the workload."""
    for descriptor in ours.values():
        os.close(descriptor)
    for pid, number in kept.items():
        with contextlib.suppress(OSError):
            spaces[pid].close_fd(number)


def _cannot(pid: int, refused: OSError) -> CannotHandleFaults:
    words = str(refused) if refused.errno is None else f"page faults of process {pid} cannot be handled: {refused}"
    return CannotHandleFaults(words)
