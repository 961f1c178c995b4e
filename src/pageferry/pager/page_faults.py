"""The right to handle page faults of a process, those of its system calls and of KVM included.

Whatever loads memory on demand needs it: lazy restore (S10), post-copy (S8), cold stores (S3). Without it a system call
that reaches a deferred page would fail with EFAULT, so none of them begins then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping

from pageferry._engine import Space
from pageferry.errors import UnsupportedError

_SYS_CLOSE = 3


class CannotHandleFaults(UnsupportedError):
    """Page faults of a process cannot be handled: this user, the process or the kernel lacks what that takes."""


def userfaults(spaces: Mapping[int, Space]) -> tuple[dict[int, int], dict[int, int]]:
    """Create a userfaultfd in each process. Return our descriptors, and the numbers of the copies that others keep.

    Ranges that the processes discard are reported. Raises CannotHandleFaults, with nothing left
    in any process, and ProcessLookupError.
    """
    ours: dict[int, int] = {}
    kept: dict[int, int] = {}
    try:
        for pid, space in spaces.items():
            ours[pid], number = space.missing_faults(discards=True)
            if number is not None:
                kept[pid] = number
    except ProcessLookupError:
        close(spaces, ours, kept)
        raise
    except OSError as refused:
        close(spaces, ours, kept)
        raise _cannot(pid, refused) from refused
    return ours, kept


def open_spaces(pids: Iterable[int]) -> dict[int, Space]:
    """The address spaces of processes. Raises CannotHandleFaults where one may not be traced, ProcessLookupError."""
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
    """Raise CannotHandleFaults unless page faults of these processes can be handled. Nothing is left in them."""
    spaces = open_spaces(pids)
    close(spaces, *userfaults(spaces))


def close(spaces: Mapping[int, Space], ours: Mapping[int, int], kept: Mapping[int, int]) -> None:
    """Close what `userfaults` returned, here and in the processes."""
    for descriptor in ours.values():
        os.close(descriptor)
    for pid, number in kept.items():
        with contextlib.suppress(OSError):
            spaces[pid].call(_SYS_CLOSE, number)


def _cannot(pid: int, refused: OSError) -> CannotHandleFaults:
    words = str(refused) if refused.errno is None else f"page faults of process {pid} cannot be handled: {refused}"
    return CannotHandleFaults(words)
