"""Tests of the order of hosts by load, against a search of all hosts."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.fleet.capacity import Room
from pageferry.fleet.model import Host
from pageferry.fleet.tiers import Tier


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 150), shared=st.booleans())
def test_best_host_is_the_least_loaded_one_of_all(seed: int, count: int, shared: bool) -> None:
    chance = random.Random(seed)
    rooms = [
        Room(Host(name=f"h{number}", memory=chance.randint(10, 50), uplinks=(f"r{number % 4}", f"w{number % 2}")))
        for number in range(count)
    ]
    own: dict[str, float] = {}
    links: dict[str, float] = {}

    def load(room: Room) -> float:
        return own.get(room.host.name, 0.0)

    def of_links(names: tuple[str, ...]) -> float:
        return max(links.get(name, 0.0) for name in names)

    def total(room: Room) -> float:
        return max(load(room), of_links(room.host.uplinks)) if shared else load(room)

    tier = Tier(rooms, load, of_links) if shared else Tier(rooms, load)
    for _ in range(60):
        need, refused = chance.randint(1, 8), {room.host.name for room in rooms if chance.random() < 0.2}
        found = tier.best(lambda room: room.host.name not in refused and room.free >= need, need)  # noqa: B023
        suitable = [room for room in rooms if room.host.name not in refused and room.free >= need]
        assert (found is None) == (not suitable)
        if found is None:
            continue
        if sum(room not in suitable and total(room) <= total(found) for room in rooms) < 60:
            assert total(found) == min(map(total, suitable))
        found.used += need
        own[found.host.name] = load(found) + chance.choice((1.0, 2.0))
        for name in found.host.uplinks:
            links[name] = links.get(name, 0.0) + chance.choice((0.0, 0.5))
