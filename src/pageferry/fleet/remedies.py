"""Instructions for operators, for moves that an execution gives up."""

from __future__ import annotations

from pageferry.fleet.steps import Cause
from pageferry.fleet.tasks import Task

AGAIN = "then plan again"


def of_failure(task: Task, cause: Cause) -> str:
    """Return what an operator must do after a move that is not repeated. The workload runs at the source."""
    move = task.move
    return {
        "full": f"free memory on other hosts or add a host, {AGAIN}",
        "refused": f"see the reason, repair {move.destination}, {AGAIN}",
        "connection-lost": f"repair the link between {move.source} and {move.destination}, {AGAIN}",
        "not-converging": f"reduce the load of {task.name}, or pause it, {AGAIN}",
        "unsupported": f"restart {task.name} without the named feature, or shut it down",
        "workload-died": f"start {task.name} again; see `pageferry logs {task.name}` on {move.source}",
        "cancelled": AGAIN.removeprefix("then "),
        "other": f"see the reason, {AGAIN}",
    }[cause]


def of_unknown(task: Task, unreachable: list[str]) -> str:
    """Return what an operator must do about a move whose outcome stays unknown. `unreachable`: hosts without an
    agent."""
    recover = f"run `pageferry migrate {task.name} --recover` on {task.move.source}"
    if unreachable:
        return f"start {' and '.join(unreachable)} with the agent, or repair the link; then {recover}"
    return f"start `pageferry receive` on {task.move.destination} with the same run directory, then {recover}"


def of_lost(task: Task) -> str:
    """Return what an operator must do about a workload that neither host reports."""
    return (
        f"run `pageferry list --all` on {task.move.source} and {task.move.destination}; if it has ended there, start "
        "it again or restore its last checkpoint"
    )


def of_unreachable(host: str) -> str:
    """Return what an operator must do about a host without an agent."""
    return f"start the agent of {host}, or repair its link, {AGAIN}"
