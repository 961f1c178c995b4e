"""Tests of plans for small fleets: destinations, modes, deadlines, and messages."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from msgspec.structs import replace

from pageferry.errors import UsageError
from pageferry.fleet import planning
from pageferry.fleet.model import Demand, Host, Image, Limits, Link, Operation, View, Workload

GIB = 1 << 30
GBIT = 125_000_000
IMAGE = Image(identity="0" * 32 + ":" + "0" * 16, memory=4 * GIB, name="web.img")
CLONE_MODES = dict.fromkeys(("hybrid", "postcopy"), "a clone is migrated in pre-copy only")


def host(name: str, **changes: Any) -> Host:
    return replace(Host(name=name, memory=64 * GIB, headroom=4 * GIB, link=GBIT), **changes)


def clone(name: str, place: str, **changes: Any) -> Workload:
    found = Workload(
        name=name,
        host=place,
        memory=4 * GIB,
        private=GIB // 4,
        base=IMAGE.identity,
        dirty_rate=1 << 20,
        cannot=CLONE_MODES,
    )
    return replace(found, **changes)


def own(name: str, place: str, **changes: Any) -> Workload:
    return replace(Workload(name=name, host=place, memory=4 * GIB, private=2 * GIB, dirty_rate=1 << 20), **changes)


WITH_IMAGE = frozenset({IMAGE.identity})


def test_clones_are_moved_to_hosts_with_their_image_by_their_private_pages() -> None:
    view = View(
        hosts=(host("a", images=WITH_IMAGE), host("b"), host("c", images=WITH_IMAGE), host("d")),
        workloads=tuple(clone(f"w{number}", "a") for number in range(8)),
        images=(IMAGE,),
    )
    plan = planning.evacuate(view, ["a"])
    assert {move.destination for move in plan.moves} == {"c"}
    assert all(move.shares_base for move in plan.moves)
    one_after_another = 8 * 4 * GIB / GBIT
    assert plan.makespan < one_after_another / 4
    assert plan.bytes < 8 * GIB // 4 * 1.1


def test_clones_are_sent_in_full_if_no_host_has_their_image() -> None:
    view = View(hosts=(host("a", images=WITH_IMAGE), host("b")), workloads=(clone("w", "a"),), images=(IMAGE,))
    (move,) = planning.evacuate(view, ["a"]).moves
    assert (move.shares_base, move.bytes >= 4 * GIB) == (False, True)
    assert "all pages are sent" in move.reason


def test_a_base_is_counted_once_on_a_host() -> None:
    view = View(
        hosts=(host("a", images=WITH_IMAGE), host("b", images=WITH_IMAGE, memory=10 * GIB)),
        workloads=tuple(clone(f"w{number}", "a") for number in range(6)),
        images=(IMAGE,),
    )
    plan = planning.evacuate(view, ["a"])
    # 4 GiB of the base, 6 * 0.25 GiB of private pages, and 2 * 0.25 GiB of staging files: 6 GiB of 10 - 4 GiB.
    assert len(plan.moves) == 6
    smaller = replace(view, hosts=(view.hosts[0], replace(view.hosts[1], memory=10 * GIB - 1)))
    assert len(planning.evacuate(smaller, ["a"]).moves) == 5


def test_workloads_of_a_group_are_not_placed_together() -> None:
    view = View(
        hosts=(host("a"), host("b"), host("c")),
        workloads=(own("w1", "a", group="db"), own("w2", "b", group="db"), own("w3", "a")),
    )
    plan = planning.evacuate(view, ["a"])
    assert {move.workload: move.destination for move in plan.moves}["w1"] == "c"
    crowded = replace(view, workloads=(*view.workloads, own("w4", "c", group="db")))
    (unplaced,) = planning.evacuate(crowded, ["a"]).unplaced
    assert unplaced.workload == "w1"
    assert "group db" in unplaced.reason


@pytest.mark.parametrize(
    ("dirty", "cannot", "mode", "throttled"),
    [
        (10 << 20, {}, "precopy", False),
        (80 << 20, {}, "hybrid", False),
        (80 << 20, {"hybrid": "x"}, "postcopy", False),
        (80 << 20, CLONE_MODES, "precopy", True),
        (None, {}, "hybrid", False),
        (None, CLONE_MODES, "precopy", True),
        (10 << 20, {"precopy": "x"}, "hybrid", False),
    ],
)
def test_mode_is_chosen_by_the_dirty_rate_against_the_link(
    dirty: int | None, cannot: dict[str, str], mode: str, throttled: bool
) -> None:
    view = View(hosts=(host("a"), host("b")), workloads=(own("w", "a", dirty_rate=dirty, cannot=cannot),))
    (move,) = planning.evacuate(view, ["a"]).moves
    assert (move.mode, move.auto_converge) == (mode, throttled)


def test_deadline_is_honoured_by_post_copy_or_the_plan_states_the_reason() -> None:
    view = View(
        hosts=(host("a"), host("b"), host("c")),
        workloads=tuple(own(f"w{number}", "a", dirty_rate=40 << 20) for number in range(4)),
    )
    slow = planning.evacuate(view, ["a"])
    assert {move.mode for move in slow.moves} == {"precopy"}
    fast = planning.evacuate(view, ["a"], deadline=slow.makespan * 0.8)
    assert fast.meets_deadline
    assert "postcopy" in {move.mode for move in fast.moves}
    assert "post-copy" in str(fast.deadline_note)
    impossible = planning.evacuate(view, ["a"], deadline=10.0)
    assert not impossible.meets_deadline
    assert "cannot be met" in str(impossible.deadline_note)
    assert "of 4 moves end in time" in str(impossible.deadline_note)


@pytest.mark.parametrize(
    ("changes", "reason", "remedy"),
    [
        ({"status": "unknown"}, "outcome of an earlier move is unknown", "--recover` on a"),
        ({"status": "busy"}, "a command uses it", "wait"),
        ({"cannot": {"move": "it uses VFIO"}}, "it uses VFIO", "shut it down"),
        ({"private": 61 * GIB, "memory": 64 * GIB}, "it needs 62464 MiB", "add a host"),
    ],
)
def test_workloads_without_a_place_are_named_with_reason_and_remedy(
    changes: dict[str, Any], reason: str, remedy: str
) -> None:
    view = View(hosts=(host("a"), host("b")), workloads=(own("w", "a", **changes), own("other", "a")))
    plan = planning.evacuate(view, ["a"])
    assert [move.workload for move in plan.moves] == ["other"]
    (unplaced,) = plan.unplaced
    assert reason in unplaced.reason
    assert remedy in unplaced.remedy


def test_running_operations_keep_a_workload_where_it_is() -> None:
    running = Operation(verb="checkpoint", workload="w", host="a")
    view = View(hosts=(host("a"), host("b")), workloads=(own("w", "a"),), operations=(running,))
    (unplaced,) = planning.evacuate(view, ["a"]).unplaced
    assert "a checkpoint uses it" in unplaced.reason


def test_uplinks_limit_the_plan_and_the_lower_bound() -> None:
    slow = Link(name="rack", rate=GBIT)
    inside = tuple(host(name, uplinks=("rack",)) for name in ("a", "b"))
    view = View(
        hosts=(*inside, host("c"), host("d")),
        workloads=tuple(own(f"{name}{number}", name) for name in ("a", "b") for number in range(3)),
        links=(slow,),
    )
    plan = planning.evacuate(view, ["a", "b"])
    assert plan.lower_bound == pytest.approx(6 * 2 * GIB / GBIT)
    assert plan.lower_bound < plan.makespan < 1.3 * plan.lower_bound
    assert {peak.link for peak in plan.peaks} >= {"rack out", "a out"}
    assert all(peak.rate <= peak.capacity for peak in plan.peaks)


def test_rebalancing_moves_few_workloads() -> None:
    view = View(hosts=(host("a"), host("b"), host("c")), workloads=tuple(own(f"w{n}", "a") for n in range(12)))
    plan = planning.rebalance(view, tolerance=0.1)
    assert 3 <= len(plan.moves) <= 6
    level = View(hosts=view.hosts, workloads=tuple(own(f"w{n}", "abc"[n % 3]) for n in range(12)))
    assert planning.rebalance(level).moves == ()


def test_new_clones_are_spread_or_packed() -> None:
    view = View(hosts=tuple(host(name, images=WITH_IMAGE) for name in "abc"), images=(IMAGE,))
    spread = planning.place(view, Demand(image=IMAGE.identity, count=6, policy="spread"))
    packed = planning.place(view, Demand(image=IMAGE.identity, count=6, policy="pack"))
    assert sorted(one.host for one in spread.placed) == ["a", "a", "b", "b", "c", "c"]
    assert len({one.host for one in packed.placed}) == 1
    assert [one.workload for one in packed.placed] == [f"clone-{number}" for number in range(1, 7)]
    assert sum(one.bytes for one in packed.placed) < sum(one.bytes for one in spread.placed)


def test_new_clones_keep_out_of_names_that_exist() -> None:
    view = View(
        hosts=(host("a", images=WITH_IMAGE),), workloads=(clone("web-1", "a"), clone("web-3", "a")), images=(IMAGE,)
    )
    plan = planning.place(view, Demand(image=IMAGE.identity, count=2, name="web-{n}"))
    assert [one.workload for one in plan.placed] == ["web-2", "web-4"]


def test_clones_without_a_host_that_has_the_image_are_named() -> None:
    plan = planning.place(View(hosts=(host("a"),)), Demand(image=IMAGE.identity, count=2))
    assert [one.workload for one in plan.unplaced] == ["clone-1", "clone-2"]
    assert "image pull" in plan.unplaced[0].remedy


def test_move_of_one_workload_is_planned_or_refused_with_a_reason() -> None:
    view = View(hosts=(host("a"), host("b"), host("c", memory=5 * GIB)), workloads=(own("w", "a"),))
    assert [move.destination for move in planning.move(view, "w", "b").moves] == ["b"]
    (refused,) = planning.move(view, "w", "c").unplaced
    assert "c cannot take it: it lacks" in refused.reason


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda view: planning.evacuate(view, ["z"]), "cannot evacuate z: no host"),
        (lambda view: planning.evacuate(view, ["a"], deadline=-1), "invalid `deadline`"),
        (lambda view: planning.evacuate(view, ["a"], limits=Limits(per_host=0)), "invalid `per_host`"),
        (lambda view: planning.evacuate(view, ["a"], limits=Limits(link_share=1.5)), "invalid `link_share`"),
        (lambda view: planning.move(view, "none", "b"), "no workload of this name"),
        (lambda view: planning.move(view, "w", "z"), "no host of this name"),
        (lambda view: planning.move(view, "w", "a"), "it is on that host"),
        (lambda view: planning.rebalance(view, tolerance=2.0), "invalid `tolerance`"),
        (lambda view: planning.place(view, Demand(image="x", count=0)), "invalid `count`"),
        (lambda view: planning.place(view, Demand(image="x", count=2, name="web")), "invalid `name`"),
        (lambda view: planning.place(view, Demand(image="x", count=1, name="w")), "is in the fleet"),
    ],
)
def test_invalid_requests_are_refused_before_anything_happens(operation: Any, message: str) -> None:
    view = View(hosts=(host("a"), host("b")), workloads=(own("w", "a"),))
    with pytest.raises(UsageError, match=message):
        operation(view)


def test_scarce_memory_is_filled_by_best_fit() -> None:
    big, small = 20 * GIB, 9 * GIB
    sizes = {"s1": small, "s2": small, "b1": big}
    view = View(
        hosts=(host("a", memory=128 * GIB), host("b", memory=24 * GIB), host("c", memory=22 * GIB)),
        workloads=tuple(own(name, "a", memory=size, private=size) for name, size in sizes.items()),
    )
    plan = planning.evacuate(view, ["a"])
    assert {move.workload: move.destination for move in plan.moves} == {"b1": "b", "s1": "c", "s2": "c"}


def test_plans_and_their_execution_import_neither_ray_nor_the_host() -> None:
    program = "import sys, pageferry.fleet.planning, pageferry.fleet.execution; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    imported = set(done.stdout.split())
    assert not imported & {"asyncio", "numpy", "ray", "socket", "subprocess", "pageferry.host", "pageferry._engine"}
