"""Workloads that a plan may move, and the reasons why others stay."""

from __future__ import annotations

from collections.abc import Iterable

from pageferry.fleet import costs
from pageferry.fleet.model import Host, Operation, Unplaced, View, Workload


def divide(workloads: Iterable[Workload], view: View) -> tuple[list[Workload], list[Unplaced]]:
    """Divide workloads into those that can be moved, and those that cannot, with the reason."""
    hosts = {host.name: host for host in view.hosts}
    operations = {operation.workload: operation for operation in view.operations}
    movable, fixed = [], []
    for workload in workloads:
        found = obstacle(workload, hosts.get(workload.host), operations.get(workload.name))
        if found is None:
            movable.append(workload)
        else:
            fixed.append(Unplaced(workload=workload.name, reason=found[0], remedy=found[1]))
    return movable, fixed


def obstacle(workload: Workload, host: Host | None, operation: Operation | None) -> tuple[str, str] | None:
    """Return the reason why a workload cannot be moved now, and what an operator must do; None if it can."""
    if host is None or not host.reachable:
        return f"the agent of {workload.host} does not reply", f"start the agent of {workload.host}, then plan again"
    if workload.status == "unknown" or (operation is not None and operation.outcome == "unknown"):
        return (
            "the outcome of an earlier move is unknown",
            f"run `pageferry migrate {workload.name} --recover` on {workload.host}, then plan again",
        )
    if operation is not None or workload.status == "busy":
        verb = operation.verb if operation is not None else "command"
        return f"a {verb} uses it", f"wait until the {verb} has ended, or cancel it, then plan again"
    if "move" in workload.cannot:
        return workload.cannot["move"], "shut it down, or restart it without the named feature"
    if not costs.allowed_modes(workload):
        reasons = "; ".join(dict.fromkeys(workload.cannot.values()))
        return (
            f"it supports no mode of a migration: {reasons}",
            "shut it down, or restart it without the named features",
        )
    return None
