"""Plan that places new clones of an image: on the emptiest hosts (`spread`), or on as few as possible (`pack`)."""

from __future__ import annotations

from collections.abc import Callable

from pageferry.fleet import costs
from pageferry.fleet.capacity import Capacity, Room
from pageferry.fleet.model import Demand, Limits, Placed, Plan, Unplaced, View, Workload
from pageferry.fleet.rebalancing import used
from pageferry.fleet.tiers import Tier

NOWHERE = ""
"""Host of a clone that is not started yet."""


def place(view: View, demand: Demand, limits: Limits) -> Plan:
    """Return a plan that starts clones. See `planning.place`."""
    capacity = Capacity(view)
    rooms = [
        room
        for room in capacity.rooms.values()
        if room.host.reachable
        and not room.host.draining
        and demand.image in room.host.images | room.host.bases | room.bases.keys()
    ]
    choose = _spread(rooms, capacity) if demand.policy == "spread" else _pack(rooms, capacity)
    placed, unplaced = [], []
    for workload in _clones(demand, view, capacity):
        room = choose(workload)
        if room is None:
            unplaced.append(_refused(workload, rooms, capacity))
            continue
        need, first = capacity.need(workload, room.host.name), not room.holds(workload)
        capacity.add(workload, room.host.name)
        why = "first clone of the image on this host" if first else "shares the base there"
        placed.append(Placed(workload=workload.name, image=demand.image, host=room.host.name, bytes=need, reason=why))
    return Plan(placed=tuple(placed), unplaced=tuple(unplaced), limits=limits)


def _clones(demand: Demand, view: View, capacity: Capacity) -> list[Workload]:
    """Return the clones of a demand, with names that no workload of the fleet has."""
    memory = demand.memory or capacity.sizes.get(demand.image, 0)
    private = round(costs.PRIVATE_SHARE * memory) if demand.private is None else demand.private
    taken, number = {workload.name for workload in view.workloads}, 0
    found: list[Workload] = []
    while len(found) < demand.count:
        number += 1
        name = demand.name.replace("{n}", str(number))
        if name not in taken:
            found.append(
                Workload(name=name, host=NOWHERE, memory=memory, private=private, base=demand.image, group=demand.group)
            )
    return found


def _spread(rooms: list[Room], capacity: Capacity) -> Callable[[Workload], Room | None]:
    tier = Tier(rooms, used)

    def choose(workload: Workload) -> Room | None:
        return tier.best(lambda room: capacity.refusal(workload, room.host.name, moving=0) is None, workload.private)

    return choose


def _pack(rooms: list[Room], capacity: Capacity) -> Callable[[Workload], Room | None]:
    """Fill one host after the other: those with the base in memory first, then the fullest."""
    waiting: list[Room] = []

    def choose(workload: Workload) -> Room | None:
        if not waiting:
            waiting.extend(sorted(rooms, key=lambda room: (room.holds(workload), -room.free, room.host.name)))
        while waiting:
            if capacity.refusal(workload, waiting[-1].host.name, moving=0) is None:
                return waiting[-1]
            # All clones of a demand are equal: a host that refuses one refuses all others.
            waiting.pop()
            if not waiting:
                rooms.clear()
        return None

    return choose


def _refused(workload: Workload, rooms: list[Room], capacity: Capacity) -> Unplaced:
    if not rooms:
        return Unplaced(
            workload=workload.name,
            reason=f"no reachable host that accepts workloads has the image {workload.base}, or all are full",
            remedy="copy the image to a host (`pageferry image pull`), or add hosts",
        )
    best = max(rooms, key=lambda room: room.free)
    reason = capacity.refusal(workload, best.host.name, moving=0) or "every host refuses it"
    return Unplaced(
        workload=workload.name,
        reason=f"{best.host.name}, the emptiest host with the image, cannot take it: {reason}",
        remedy="copy the image to more hosts (`pageferry image pull`), add hosts, or start fewer clones",
    )
