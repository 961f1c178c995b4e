"""Functions that child processes of test_handles run. Children of spawn and forkserver import this module."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

import pageferry


def fill(shared: Any, value: int) -> tuple[int, str]:
    """Write to the shared memory. Return the process id and the type of the object."""
    match shared:
        case pageferry.Arrays():
            shared["x"][:] = value
        case np.ndarray():
            shared[...] = value
        case _:
            memoryview(shared)[:4] = value.to_bytes(4, "little")
    return os.getpid(), type(shared).__name__


def total(array: Any) -> tuple[int, float, bool]:
    """Return the process id, the sum of an array, and whether it is writable."""
    return os.getpid(), float(array.sum()), bool(array.flags.writeable)


def returned(shared: Any) -> Any:
    """Return the object to the parent."""
    return shared


def count_up(shared: Any, going: Any, ready: Any) -> None:
    """Write increasing numbers to both ends of the array `x`, until `going` is cleared."""
    array = shared["x"]
    number = 0
    while going.is_set():
        number += 1
        array[0] = number
        array[-1] = number
        ready.set()
        time.sleep(0.0005)
