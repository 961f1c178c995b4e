"""Moves, saves and shapes the memory of running workloads, from outside them.

::

    arena = pageferry.Arena(1 << 30)                        # memory that numpy can use, and that can move
    pageferry.migrate(arena, "127.0.0.1:7070")        # to a receiver, while it is in use
    arena = pageferry.receive("127.0.0.1:7070")       # the receiver
    pageferry.checkpoint(arena, "table.img")          # saved while it is in use
    arena = pageferry.restore("table.img")                  # there at once; what is touched is read first

Where nobody has said how a migration ended (`errors.OutcomeUnknown`), `recover` asks the receiver, and `take_back` lets
the arena run here again. `large_pages` says which large pages of a process are hardly used, and reclaims from those;
`sharing` finds equal pages, and shares them where it pays. What is raised is in `errors`. The command `pageferry` does
the same for QEMU guests.
"""

from typing import TYPE_CHECKING

from pageferry.lazy import lazily

if TYPE_CHECKING:
    from pageferry import errors, large_pages, sharing
    from pageferry.checkpoints.restore_arena import restore, restore_async
    from pageferry.checkpoints.save import checkpoint, checkpoint_async
    from pageferry.migration.api import (
        migrate,
        migrate_async,
        receive,
        receive_async,
        recover,
        recover_async,
        take_back,
        take_back_async,
    )
    from pageferry.workloads.arena.arena import Arena

__all__ = [
    "Arena",
    "checkpoint",
    "checkpoint_async",
    "errors",
    "large_pages",
    "migrate",
    "migrate_async",
    "receive",
    "receive_async",
    "recover",
    "recover_async",
    "restore",
    "restore_async",
    "sharing",
    "take_back",
    "take_back_async",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Arena": "pageferry.workloads.arena.arena",
        "checkpoint": "pageferry.checkpoints.save",
        "checkpoint_async": "pageferry.checkpoints.save",
        "errors": "pageferry.errors",
        "large_pages": "pageferry.large_pages",
        "migrate": "pageferry.migration.api",
        "migrate_async": "pageferry.migration.api",
        "receive": "pageferry.migration.api",
        "receive_async": "pageferry.migration.api",
        "recover": "pageferry.migration.api",
        "recover_async": "pageferry.migration.api",
        "restore": "pageferry.checkpoints.restore_arena",
        "restore_async": "pageferry.checkpoints.restore_arena",
        "sharing": "pageferry.sharing",
        "take_back": "pageferry.migration.api",
        "take_back_async": "pageferry.migration.api",
    },
)
