"""Tests of huge page sampling: choice of samples, estimates, policy, and human-readable output."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pageferry.errors import UsageError
from pageferry.large_pages.estimate import estimate
from pageferry.large_pages.events import LargePagesResult, Overhead, RegionActivity, Sample
from pageferry.large_pages.options import Options
from pageferry.large_pages.policy import Facts, Threshold
from pageferry.large_pages.sampler import LargePage
from pageferry.large_pages.selection import Sampling
from pageferry.memory.regions import LARGE_PAGE
from pageferry.report.large_pages import LargePagesView
from pageferry.workloads.target import Area, Kind

COUNTS = st.lists(st.integers(0, 512), min_size=1, max_size=50)


def area(units: int, kind: Kind = "shared", **changes: Any) -> Area:
    values = {"pid": 1, "address": 0, "length": units * LARGE_PAGE, "region": 0, "offset": 0, "page_size": 4096}
    return Area(kind=kind, name="ram0", **(values | changes))


def pages(count: int, kind: Kind = "shared") -> list[LargePage]:
    whole = area(count, kind)
    return [LargePage(whole, address) for address in whole.large_pages()]


def test_large_pages_of_an_area() -> None:
    assert list(area(3).large_pages()) == [0, LARGE_PAGE, 2 * LARGE_PAGE]
    assert list(area(3, address=4096, offset=4096).large_pages()) == [LARGE_PAGE, 2 * LARGE_PAGE]
    assert list(area(3, address=4096).large_pages()) == [], "no huge page of the file is aligned in memory"
    assert list(area(3, "anon", address=4096, region=None).large_pages()) == [LARGE_PAGE, 2 * LARGE_PAGE]


def test_every_page_is_sampled_once() -> None:
    sampling, candidates = Sampling(0.3, None, seed=1), pages(10)
    rounds = []
    while chosen := sampling.choose(candidates, 0.2):
        sampling.account(chosen, 0.001)
        rounds.append(chosen)
    assert [len(chosen) for chosen in rounds] == [3, 3, 3, 1]
    assert sorted(page.address for chosen in rounds for page in chosen) == [page.address for page in candidates]


def test_samples_shrink_to_the_budget() -> None:
    sampling, candidates = Sampling(1.0, 0.01, seed=1), pages(1000)
    first = sampling.choose(candidates, 0.2)
    assert len(first) == 50, "2 ms at an assumed 40 us per page"
    sampling.account(first, 50 * 200e-6)
    assert len(sampling.choose(candidates, 0.2)) == 10
    sampling.account(sampling.choose(candidates, 0.2), 1.0)
    assert len(sampling.choose(candidates, 0.2)) == 1, "at least one page; otherwise, sampling would not end"


@given(st.integers(1, 40), st.integers(0, 1000))
def test_no_two_private_pages_of_a_round_are_adjacent(count: int, seed: int) -> None:
    sampling, candidates, rounds = Sampling(1.0, None, seed), pages(count, "anon"), 0
    while chosen := sampling.choose(candidates, 0.2):
        addresses = sorted(page.address for page in chosen)
        assert all(after - before > LARGE_PAGE for before, after in itertools.pairwise(addresses))
        sampling.account(chosen, 0.001)
        rounds += 1
    assert rounds <= 3


@given(COUNTS, st.integers(0, 1000))
def test_estimates_are_consistent_with_the_samples(counts: list[int], unseen: int) -> None:
    found = estimate(counts, len(counts) + unseen)
    assert 0 <= found.low <= found.mean <= found.high <= 512
    assert found.idle_low <= found.idle <= found.idle_high
    if not unseen:
        assert found.low == found.mean == found.high
        assert found.idle == sum(512 - count for count in counts) * 4096


def test_confidence_intervals_contain_the_true_mean() -> None:
    randomly = random.Random(4)
    population = [randomly.choice((0, 0, 0, 5, 512)) for _ in range(1000)]
    truth = sum(population) / len(population)
    hits = 0
    for _ in range(400):
        found = estimate(randomly.sample(population, 80), len(population))
        hits += found.low <= truth <= found.high
    assert hits >= 360


def test_identical_samples_have_a_nonzero_interval() -> None:
    found = estimate([0] * 10, 1000)
    assert found.mean == found.low == 0
    assert 100 < found.high < 160
    nothing = estimate([], 10)
    assert (nothing.low, nothing.high, nothing.sampled) == (0, 512, 0)
    assert estimate([], 0).idle_high == 0


def test_policy_decides_by_activity_sharing_and_free_memory() -> None:
    policy = Threshold(activity=64)
    assert [policy.decide(Facts(activity=count)) for count in (0, 64, 65, 255, 256, 512)] == [
        *["break"] * 2,
        *["keep"] * 2,
        *["restore"] * 2,
    ]
    assert policy.decide(Facts(activity=128, free=0.05)) == "break"
    assert policy.decide(Facts(activity=300, sharing=256, free=0.05)) == "break"
    assert policy.decide(Facts(activity=300, sharing=256, free=0.5)) == "restore"


@pytest.mark.parametrize(
    "options", [{"sample": 0.0}, {"sample": 1.5}, {"window": 0.0}, {"window": 61}, {"rounds": 0}, {"budget": 2.0}]
)
def test_invalid_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Options(**options)


def test_result_is_shown_as_text() -> None:
    common: dict[str, Any] = {"pid": 1, "region": "ram0", "kind": "shared"}
    samples = [
        Sample(address=0x200000, activity=8, touched=f"{0xFF:0128x}", decision="break", **common),
        Sample(address=0x400000, activity=512, touched="f" * 128, decision="restore", **common),
        Sample(address=0x600000, activity=256, touched=None, decision="restore", **common),
    ]
    result = LargePagesResult(
        target="guest",
        window_ms=200,
        rounds=1,
        regions=[
            RegionActivity(name="ram0", kind="shared", bytes=8 << 20, large_pages=4, sampled=3, idle=0, mean=258.7)
        ],
        samples=samples,
        histogram=[0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1],
        estimate=estimate([8, 512, 256], 4),
        reclaimed=1 << 20,
        broken=1,
        restored=3,
        not_restored=0,
        overhead=Overhead(cpu_ms=1, fraction=0.005, budget=0.01, faults=520, per_page_us=30),
        skipped=["[x]: Permission denied"],
    )
    console = Console(width=140, no_color=True)
    with console.capture() as captured:
        console.print(LargePagesView().result(result))
    text = captured.get()
    assert f"0x200000 [█{' ' * 63}]   8 break" in text
    assert f"0x400000 [{'█' * 64}] 512 restore" in text
    assert f"0x600000 [{'-' * 32}{' ' * 32}] 256 restore" in text
    assert "reclaimed: 1 MiB to swap, 1 huge pages split" in text
    assert "skipped: [x]: Permission denied" in text
