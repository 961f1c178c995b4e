"""Moves, saves and shapes the memory of running workloads, from outside them.

::

    arena = pageferry.Arena(1 << 30)                        # memory that numpy can use, and that can move
    await pageferry.migrate(arena, "127.0.0.1:7070")        # to a receiver, while it is in use
    arena = await pageferry.receive("127.0.0.1:7070")       # the receiver
    await pageferry.checkpoint(arena, "table.img")          # saved while it is in use
    arena = pageferry.restore("table.img")                  # there at once; what is touched is read first

Errors are those of `pageferry.errors`; the command `pageferry` does the same for QEMU guests.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pageferry import large_pages, sharing
    from pageferry.checkpoints.arenas import restore
    from pageferry.checkpoints.save import checkpoint
    from pageferry.migration.api import migrate, receive, recover, take_back
    from pageferry.workloads.arena import Arena

__all__ = [
    "Arena",
    "checkpoint",
    "large_pages",
    "migrate",
    "receive",
    "recover",
    "restore",
    "sharing",
    "take_back",
]

_HOMES = {
    "Arena": "workloads.arena",
    "checkpoint": "checkpoints.save",
    "migrate": "migration.api",
    "receive": "migration.api",
    "recover": "migration.api",
    "restore": "checkpoints.arenas",
    "take_back": "migration.api",
}
_PARTS = {"large_pages", "sharing"}
"""Modules of their own."""


def __getattr__(name: str) -> object:
    # Imported when first asked for: a command, or a program that has only arenas, does not wait for the rest.
    if name not in _HOMES and name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
