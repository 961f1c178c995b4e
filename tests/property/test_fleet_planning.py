"""Tests of plans for random fleets: memory, anti-affinity, links, and completeness."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pageferry.fleet import costs, planning
from pageferry.fleet.capacity import Capacity
from pageferry.fleet.links import Network
from pageferry.fleet.model import Demand, Host, Image, Limits, Link, Operation, Plan, View, Workload

MIB = 1 << 20
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
IMAGES = tuple(Image(identity=f"{number:032x}:{number:016x}", memory=(8 << number) * MIB) for number in range(3))


@st.composite
def views(draw: st.DrawFn) -> View:
    """Return a fleet in which no host is overfilled at first."""
    seed, count = draw(st.integers(0, 1 << 30)), draw(st.integers(2, 9))
    chance = random.Random(seed)
    room = draw(st.sampled_from([40, 100, 400]))
    links = tuple(Link(name=f"rack-{number}", rate=chance.choice((1, 4)) * MIB) for number in range(3))
    hosts = tuple(_host(chance, f"h{number}", room) for number in range(count))
    view = View(hosts=hosts, images=IMAGES, links=links)
    workloads: list[Workload] = []
    for number in range(draw(st.integers(1, 24))):
        workload = _workload(chance, f"w{number}", chance.choice(hosts))
        grown = replace(view, workloads=(*workloads, workload))
        if workload.base is None or workload.base in _host_of(view, workload).images:
            rooms = Capacity(grown).rooms.values()
            if all(one.free >= 0 and max(one.groups.values(), default=0) <= 1 for one in rooms):
                workloads.append(workload)
    return replace(view, workloads=tuple(workloads))


def _host(chance: random.Random, name: str, room: int) -> Host:
    return Host(
        name=name,
        memory=chance.randint(room // 2, room) * MIB,
        headroom=chance.choice((0, 8)) * MIB,
        link=chance.choice((1, 2)) * MIB,
        images=frozenset(image.identity for image in IMAGES if chance.random() < 0.6),
        uplinks=chance.choice(((), ("rack-0",), ("rack-1",), ("rack-0", "rack-2"))),
        draining=chance.random() < 0.1,
        reachable=chance.random() < 0.9,
    )


def _workload(chance: random.Random, name: str, host: Host) -> Workload:
    image = chance.choice((None, *IMAGES))
    memory = image.memory if image is not None else chance.randint(1, 32) * MIB
    modes = [mode for mode in ("precopy", "hybrid", "postcopy") if chance.random() < 0.2]
    return Workload(
        name=name,
        host=host.name,
        memory=memory,
        private=chance.randint(1, memory // MIB) * MIB,
        base=None if image is None else image.identity,
        dirty_rate=chance.choice((None, 0, 1000, MIB // 4, MIB, 4 * MIB)),
        group=chance.choice((None, None, "a", "b")),
        cannot=dict.fromkeys([*modes, *(["move"] if chance.random() < 0.1 else [])], "a test"),
        status=chance.choice(("running", "running", "running", "paused", "busy", "unknown")),
    )


def _host_of(view: View, workload: Workload) -> Host:
    return next(host for host in view.hosts if host.name == workload.host)


def check(view: View, plan: Plan) -> None:
    """Check the rules for every plan."""
    check_memory(view, plan)
    check_links(view, plan)
    workloads = {one.name: one for one in view.workloads}
    hosts = {host.name: host for host in view.hosts}
    for move in plan.moves:
        workload, target = workloads[move.workload], hosts[move.destination]
        assert (move.source, move.destination != move.source) == (workload.host, True)
        assert target.reachable
        assert not target.draining
        assert hosts[move.source].reachable
        assert move.mode not in workload.cannot
        assert "move" not in workload.cannot
        assert workload.status in ("running", "paused")
        assert move.rate > 0
        assert move.seconds > 0
        assert move.bytes >= workload.private
        assert not (move.shares_base and workload.base is None)
    assert plan.bytes == sum(move.bytes for move in plan.moves)
    assert plan.makespan == max((move.start + move.seconds for move in plan.moves), default=0.0)
    assert plan.makespan >= plan.lower_bound * 0.999
    assert [move.start for move in plan.moves] == sorted(move.start for move in plan.moves)
    for one in plan.unplaced:
        assert one.reason
        assert one.remedy
    names = names_of(plan)
    assert len(names) == len(set(names))


def names_of(plan: Plan) -> list[str]:
    """Return the names of all workloads in a plan."""
    placed = [one.workload for one in plan.placed]
    return [move.workload for move in plan.moves] + [one.workload for one in plan.unplaced] + placed


def check_memory(view: View, plan: Plan) -> None:
    """Check each time at which a move starts or ends, with every set of moves that ended in failure: a workload counts
    on both hosts while it is moved, and stays at its source if its move fails."""
    workloads = {one.name: one for one in view.workloads}
    times = sorted({move.start for move in plan.moves})
    for failed in (False, True):
        for now in times:
            used = _Use(view)
            incoming: Counter[str] = Counter()
            for one in view.workloads:
                used.add(one, one.host)
            for move in plan.moves:
                workload = workloads[move.workload]
                if move.start <= now:
                    used.add(workload, move.destination)
                    if now < move.start + move.seconds:
                        incoming[move.destination] += costs.staging(workload, move.shares_base)
                    elif not failed:
                        used.remove(workload, move.source)
            for host in view.hosts:
                assert used.memory(host) + incoming[host.name] <= host.memory - host.headroom, host.name
                groups = [one.group for one in used.of(host) if one.group is not None]
                assert len(groups) == len(set(groups))


class _Use:
    """Memory of hosts, added up independently of the planner."""

    def __init__(self, view: View) -> None:
        self._sizes = {image.identity: image.memory for image in view.images}
        self._users: dict[str, dict[str, Workload]] = {host.name: {} for host in view.hosts}

    def add(self, workload: Workload, host: str) -> None:
        self._users[host][workload.name] = workload

    def remove(self, workload: Workload, host: str) -> None:
        del self._users[host][workload.name]

    def of(self, host: Host) -> list[Workload]:
        return list(self._users[host.name].values())

    def memory(self, host: Host) -> int:
        users = self.of(host)
        bases = {one.base for one in users if one.base is not None and one.base in host.images}
        own = [one for one in users if one.base is not None and one.base not in host.images]
        full = sum(max(one.private, min(one.memory, one.private + self._sizes[str(one.base)])) for one in own)
        private = sum(one.private for one in users if one not in own)
        return full + private + sum(self._sizes[base] for base in bases)


def check_links(view: View, plan: Plan) -> None:
    """Check that the average rates of the moves fit onto the links, and that limits per host and link are kept."""
    network = Network(view, plan.limits)
    for now in {move.start for move in plan.moves}:
        rates: dict[int, float] = {}
        hosts: Counter[str] = Counter()
        for move in plan.moves:
            if move.start <= now < move.start + move.seconds * (1 - 1e-9):
                hosts.update((move.source, move.destination))
                for direction in network.path(move.source, move.destination).directions:
                    rates[direction] = rates.get(direction, 0.0) + move.bytes / move.seconds
        assert max(hosts.values(), default=0) <= plan.limits.per_host
        for direction, rate in rates.items():
            assert rate <= network.capacity[direction] * 1.001 + 1, network.name(direction)


@SETTINGS
@given(view=views(), numbers=st.sets(st.integers(0, 8), min_size=1, max_size=3), per_host=st.integers(1, 4))
def test_evacuation_of_random_fleets_obeys_all_rules(view: View, numbers: set[int], per_host: int) -> None:
    hosts = {host.name for host in view.hosts} & {f"h{number}" for number in numbers}
    plan = planning.evacuate(view, hosts, limits=Limits(per_host=per_host))
    check(view, plan)
    leaving = {one.name for one in view.workloads if one.host in hosts}
    assert leaving == set(names_of(plan))
    assert not {move.destination for move in plan.moves} & hosts
    assert plan == planning.evacuate(view, hosts, limits=Limits(per_host=per_host))


@SETTINGS
@given(view=views(), deadline=st.floats(0.5, 200.0))
def test_deadline_is_met_or_the_plan_states_the_reason(view: View, deadline: float) -> None:
    plan = planning.evacuate(view, [view.hosts[0].name], deadline=deadline)
    check(view, plan)
    assert plan.makespan <= planning.evacuate(view, [view.hosts[0].name]).makespan + 1e-6
    assert plan.deadline_note is not None
    assert plan.deadline_note.startswith("cannot be met") == (plan.makespan > deadline)


def after(view: View, plan: Plan) -> View:
    """Return the fleet after all moves. A clone whose pages were all sent has memory of its own."""
    moves = {move.workload: move for move in plan.moves}
    sizes = {image.identity: image.memory for image in view.images}
    found = []
    for one in view.workloads:
        move = moves.get(one.name)
        moved = one if move is None else replace(one, host=move.destination)
        if move is not None and one.base is not None and not move.shares_base:
            moved = replace(moved, base=None, private=costs.occupied(one, False, sizes))
        found.append(moved)
    return replace(view, workloads=tuple(found))


@SETTINGS
@given(view=views(), tolerance=st.sampled_from([0.0, 0.05, 0.2]))
def test_rebalancing_overloads_no_host_and_relieves_overloaded_ones(view: View, tolerance: float) -> None:
    plan = planning.rebalance(view, tolerance=tolerance)
    check(view, plan)
    rooms = Capacity(view).rooms
    open_rooms = [room for room in rooms.values() if room.host.reachable and not room.host.draining]
    if not plan.moves:
        return
    most = sum(room.used for room in open_rooms) / sum(room.limit for room in open_rooms) + tolerance
    later = Capacity(after(view, plan))
    for move in plan.moves:
        assert rooms[move.source].used > most * rooms[move.source].limit
        assert later.rooms[move.destination].used <= most * later.rooms[move.destination].limit + 1


@SETTINGS
@given(view=views(), policy=st.sampled_from(["spread", "pack"]), count=st.integers(1, 20), group=st.booleans())
def test_clones_are_placed_where_they_fit_or_named(view: View, policy: str, count: int, group: bool) -> None:
    demand = Demand(image=IMAGES[0].identity, count=count, policy=policy, group="a" if group else None)  # type: ignore[arg-type]
    plan = planning.place(view, demand)
    assert len(plan.placed) + len(plan.unplaced) == count
    new = tuple(
        Workload(
            name=one.workload,
            host=one.host,
            memory=IMAGES[0].memory,
            private=round(costs.PRIVATE_SHARE * IMAGES[0].memory),
            base=demand.image,
            group=demand.group,
        )
        for one in plan.placed
    )
    rooms = Capacity(replace(view, workloads=(*view.workloads, *new))).rooms
    assert {one.host for one in plan.placed} <= {host.name for host in view.hosts if demand.image in host.images}
    for room in rooms.values():
        assert room.free >= 0
        assert max(room.groups.values(), default=0) <= 1
    before = Capacity(view).rooms
    assert sum(one.bytes for one in plan.placed) == sum(rooms[name].used - before[name].used for name in rooms)


@SETTINGS
@given(view=views())
def test_unknown_outcomes_count_on_both_hosts_and_are_not_moved(view: View) -> None:
    first, second = view.hosts[:2]
    found = next((one for one in view.workloads if one.host == first.name), None)
    if found is None:
        return
    open_move = Operation(verb="move", workload=found.name, host=first.name, destination=second.name, outcome="unknown")
    doubtful = replace(view, operations=(open_move,))
    before, after = Capacity(view).rooms, Capacity(doubtful).rooms
    assert after[first.name].used == before[first.name].used
    assert after[second.name].used - before[second.name].used >= found.private
    plan = planning.evacuate(doubtful, [first.name])
    assert found.name in {one.workload for one in plan.unplaced}
