"""Reservation of addresses for arenas, which a limit of the process may prevent."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from pageferry.errors import WorkloadError


@contextlib.contextmanager
def reserving(name: str, length: int) -> Iterator[None]:
    """Raise WorkloadError if the process has no `length` bytes of free addresses for an arena, for example because of a
    limit on its address space."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise WorkloadError(
            f"cannot map arena {name}: no {length} bytes of addresses are available ({error.strerror}); use a smaller "
            "size or `capacity`, or raise the limit of the address space, RLIMIT_AS (`ulimit -v`)"
        ) from error
