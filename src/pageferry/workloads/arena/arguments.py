"""Checks of the arguments of arenas, made before any other action. They raise UsageError."""

from __future__ import annotations

from typing import Any

from pageferry import values
from pageferry.errors import UsageError, WrongType
from pageferry.host.registry import check_name
from pageferry.workloads import callbacks
from pageferry.workloads.arena.limits import MAX_ARENA


def check_arena(
    name: Any, state: object, on_pause: object, on_resume: object, on_moved: object, **flags: object
) -> None:
    """Check the parameters that `Arena`, `receive` and `restore` share. `flags`: further Boolean parameters."""
    if name is not None:
        check_name(name)
    check_state(state)
    for parameter, callback in (("on_pause", on_pause), ("on_resume", on_resume), ("on_moved", on_moved)):
        if not (parameter == "on_pause" and callbacks.is_manager(callback)):
            values.optional(values.function, parameter, callback)
    for parameter, flag in flags.items():
        values.flag(parameter, flag)
    if name is not None and on_pause is None:
        raise UsageError(f"arena {name} needs `on_pause`: other processes may migrate it at any time")


def check_state(state: object) -> None:
    """Check that `state` is None, a pair of functions, or an object with `save_state` and `load_state`."""
    pair = (
        state if isinstance(state, tuple) else (getattr(state, "save_state", None), getattr(state, "load_state", None))
    )
    if state is not None and (len(pair) != 2 or not all(callable(one) for one in pair)):
        raise WrongType("invalid `state`: expected a pair of functions (save, load), or an object with both methods")


def arena_size(size: object) -> int:
    """Return the size of an arena in bytes, from a number or a text such as `1G`."""
    return values.size("size", size, 1, MAX_ARENA)
