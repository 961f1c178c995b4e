"""Fleets: many hosts, and plans that place, move and clone workloads on them.

`model` defines the records of hosts, workloads and plans. The planner (`costs`, `planning`) and the state machine that
carries out a plan (`execution`) are pure: they neither communicate nor read a clock. The same code therefore controls
real moves and the simulation (docs/decisions/0030-fleet-planner.md).
"""

from typing import TYPE_CHECKING

from pageferry.lazy import lazily

if TYPE_CHECKING:
    from pageferry.fleet.api import move, move_async, status, status_async

__all__ = ["move", "move_async", "status", "status_async"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "move": "pageferry.fleet.api",
        "move_async": "pageferry.fleet.api",
        "status": "pageferry.fleet.api",
        "status_async": "pageferry.fleet.api",
    },
)
