"""Options of arenas, checked once for `Arena`, `Arena.from_file`, `receive` and `restore`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypedDict

from pageferry import values
from pageferry.errors import UsageError, WrongType
from pageferry.host.registry import check_name
from pageferry.memory.regions import SMALL_PAGE
from pageferry.workloads import callbacks
from pageferry.workloads.arena.limits import MAX_ARENA
from pageferry.workloads.callbacks import Callback, Plain


class Stateful(Protocol):
    """Object whose state is migrated together with an arena."""

    def save_state(self) -> bytes | Awaitable[bytes]:
        """Return the state. pageferry calls this method at the source, while the arena is paused."""

    def load_state(self, state: bytes, /) -> object:
        """Load the state. pageferry calls this method at the destination, or in a restore, before the resume callback.
        Deferred contents are loaded when they are accessed."""


State = Stateful | tuple[Callable[[], bytes | Awaitable[bytes]], Callable[[bytes], object]]


class ArenaArguments(TypedDict, total=False):
    """Keyword arguments for the fields of `ArenaOptions` other than the name."""

    state: State | None
    on_pause: Callback | None
    on_resume: Plain | None
    on_moved: Plain | None
    direct_io: bool
    loop: asyncio.AbstractEventLoop | None
    capacity: int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaOptions:
    """Options of an arena, with the same meaning as the parameters of `Arena`. Raises UsageError."""

    name: str | None = None
    state: State | None = None
    on_pause: Callback | None = None
    on_resume: Plain | None = None
    on_moved: Plain | None = None
    direct_io: bool = True
    loop: asyncio.AbstractEventLoop | None = None
    capacity: int | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacity", values.optional(values.size, "capacity", self.capacity, 1, MAX_ARENA))
        if self.name is not None:
            check_name(self.name)
        _check_state(self.state)
        for parameter in ("on_pause", "on_resume", "on_moved"):
            callback = getattr(self, parameter)
            if not (parameter == "on_pause" and callbacks.is_manager(callback)):
                values.optional(values.function, parameter, callback)
        values.flag("direct_io", self.direct_io)
        values.optional(values.instance, "loop", self.loop, asyncio.AbstractEventLoop)
        if self.name is not None and self.on_pause is None:
            raise UsageError(
                f"cannot name arena {self.name} without `on_pause`: other processes may migrate it at any time"
            )

    def arguments(self) -> ArenaArguments:
        """Return these options, without the name, as arguments of `Arena.from_file`."""
        return ArenaArguments(
            state=self.state,
            on_pause=self.on_pause,
            on_resume=self.on_resume,
            on_moved=self.on_moved,
            direct_io=self.direct_io,
            loop=self.loop,
            capacity=self.capacity,
        )

    def room(self, length: int) -> int:
        """Return the number of bytes of addresses to reserve for an arena of `length` bytes, rounded up to whole pages.
        Raises UsageError if the capacity is smaller than the arena."""
        wanted = length if self.capacity is None else int(self.capacity)
        if (room := -(-wanted // SMALL_PAGE) * SMALL_PAGE) < length:
            raise UsageError(
                f"invalid `capacity` {wanted}: the arena has {length} bytes; pass at least that, or omit the option"
            )
        return room

    @property
    def state_callbacks(self) -> tuple[Callable[[], object], Callable[[bytes], object]] | None:
        """Functions that save and load the state; None if `state` is None."""
        if self.state is None:
            return None
        save, load = self.state if isinstance(self.state, tuple) else (self.state.save_state, self.state.load_state)
        for callback in (save, load):
            callbacks.check("state", callback)
        return save, load


def _check_state(state: object) -> None:
    """Raise WrongType unless `state` is None, a pair of functions, or an object with `save_state` and `load_state`."""
    pair = (
        state if isinstance(state, tuple) else (getattr(state, "save_state", None), getattr(state, "load_state", None))
    )
    if state is not None and (len(pair) != 2 or not all(callable(one) for one in pair)):
        raise WrongType("invalid `state`: expected a pair of functions (save, load), or an object with both methods")


def arena_size(size: object) -> int:
    """Return the size of an arena, bytes, from a number or a string such as `1G`. Raises UsageError."""
    return values.size("size", size, 1, MAX_ARENA)
