"""Migrate, save and optimise the memory of running workloads from outside.

::

    arena = pageferry.Arena(1 << 30)                  # migratable buffer for numpy and others
    pageferry.migrate(arena, "127.0.0.1:7070")        # to a receiver, while the arena is in use
    arena = pageferry.receive("127.0.0.1:7070")       # at the destination
    pageferry.checkpoint(arena, "table.img")          # while the arena is in use
    arena = pageferry.restore("table.img")            # returns at once; memory is loaded on demand

After a migration whose outcome is unknown (`errors.OutcomeUnknown`), `recover` requests the outcome from the receiver,
and `take_back` resumes the arena at the source. `large_pages` estimates how much of each huge page of a process is
used, and reclaims cold memory; `sharing` finds duplicate pages, and merges them where it pays off. `errors` defines the
exceptions. The command `pageferry` provides the same operations for QEMU guests.

`pause`, `resume`, `shutdown` and `stop` control the guests of this host by their names, `logs` returns
their output, `console` opens their serial console, and `monitor` and `qmp` execute commands of QEMU's monitor.
"""

from typing import TYPE_CHECKING

from pageferry.lazy import lazily

if TYPE_CHECKING:
    from pageferry import errors, large_pages, sharing
    from pageferry.checkpoints.restore_arena import restore, restore_async
    from pageferry.checkpoints.save import checkpoint, checkpoint_async
    from pageferry.control.console import console, console_async
    from pageferry.control.logs import logs, logs_async
    from pageferry.control.monitor import monitor, monitor_async, qmp, qmp_async
    from pageferry.control.pausing import pause, pause_async, resume, resume_async
    from pageferry.control.shutdown import shutdown, shutdown_async
    from pageferry.control.stopping import stop, stop_async
    from pageferry.migration.api import (
        migrate,
        migrate_async,
        recover,
        recover_async,
        take_back,
        take_back_async,
    )
    from pageferry.migration.receiving import receive, receive_async
    from pageferry.workloads.arena.arena import Arena

__all__ = [
    "Arena",
    "checkpoint",
    "checkpoint_async",
    "console",
    "console_async",
    "errors",
    "large_pages",
    "logs",
    "logs_async",
    "migrate",
    "migrate_async",
    "monitor",
    "monitor_async",
    "pause",
    "pause_async",
    "qmp",
    "qmp_async",
    "receive",
    "receive_async",
    "recover",
    "recover_async",
    "restore",
    "restore_async",
    "resume",
    "resume_async",
    "sharing",
    "shutdown",
    "shutdown_async",
    "stop",
    "stop_async",
    "take_back",
    "take_back_async",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Arena": "pageferry.workloads.arena.arena",
        "checkpoint": "pageferry.checkpoints.save",
        "checkpoint_async": "pageferry.checkpoints.save",
        "console": "pageferry.control.console",
        "console_async": "pageferry.control.console",
        "errors": "pageferry.errors",
        "large_pages": "pageferry.large_pages",
        "logs": "pageferry.control.logs",
        "logs_async": "pageferry.control.logs",
        "migrate": "pageferry.migration.api",
        "migrate_async": "pageferry.migration.api",
        "monitor": "pageferry.control.monitor",
        "monitor_async": "pageferry.control.monitor",
        "pause": "pageferry.control.pausing",
        "pause_async": "pageferry.control.pausing",
        "qmp": "pageferry.control.monitor",
        "qmp_async": "pageferry.control.monitor",
        "receive": "pageferry.migration.receiving",
        "receive_async": "pageferry.migration.receiving",
        "recover": "pageferry.migration.api",
        "recover_async": "pageferry.migration.api",
        "restore": "pageferry.checkpoints.restore_arena",
        "restore_async": "pageferry.checkpoints.restore_arena",
        "resume": "pageferry.control.pausing",
        "resume_async": "pageferry.control.pausing",
        "sharing": "pageferry.sharing",
        "shutdown": "pageferry.control.shutdown",
        "shutdown_async": "pageferry.control.shutdown",
        "stop": "pageferry.control.stopping",
        "stop_async": "pageferry.control.stopping",
        "take_back": "pageferry.migration.api",
        "take_back_async": "pageferry.migration.api",
    },
)
