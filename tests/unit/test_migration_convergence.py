"""Tests of the convergence policy: its decisions after simulated rounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.migration.convergence import PROGRESS, STALL_ROUNDS, Convergence, Decision

MIB = 1 << 20


def decisions(policy: Convergence, remaining: list[int], bandwidth: int = 100 * MIB) -> list[Decision]:
    """Return the decisions after rounds of one second each. `remaining`: bytes that remain after each round."""
    return [policy.after_round(bandwidth, 1.0, left) for left in remaining]


def test_switches_over_once_remaining_pages_fit_the_downtime() -> None:
    policy = Convergence(max_downtime=0.3, max_rounds=30)
    assert decisions(policy, [60 * MIB, 31 * MIB, 30 * MIB]) == [
        Decision.CONTINUE,
        Decision.CONTINUE,
        Decision.SWITCH_OVER,
    ]


def test_remaining_writes_to_disks_count_for_the_downtime() -> None:
    policy = Convergence(max_downtime=0.3, max_rounds=30)
    assert policy.after_round(100 * MIB, 1.0, 20 * MIB, (2 * MIB, 0.11)) is Decision.CONTINUE
    assert policy.after_round(100 * MIB, 1.0, 20 * MIB, (1 * MIB, 0.09)) is Decision.SWITCH_OVER


def test_zero_remaining_pages_always_converge() -> None:
    policy = Convergence(max_downtime=0.0, max_rounds=1)
    assert policy.after_round(0, 0.0, 0) is Decision.SWITCH_OVER
    assert policy.expected_downtime(0) == 0.0


def test_rounds_without_progress_are_a_stall() -> None:
    policy = Convergence(max_downtime=0.1, max_rounds=30)
    assert decisions(policy, [50 * MIB] * (STALL_ROUNDS + 1)) == [Decision.CONTINUE] * STALL_ROUNDS + [Decision.STALLED]


def test_occasional_progress_is_not_a_stall() -> None:
    policy = Convergence(max_downtime=0.1, max_rounds=30)
    left, rounds = 100.0 * MIB, []
    for _ in range(5):
        rounds += [int(left)] * (STALL_ROUNDS - 1)
        left *= PROGRESS - 0.01
    assert set(decisions(policy, rounds)) == {Decision.CONTINUE}


def test_number_of_rounds_is_bounded() -> None:
    policy = Convergence(max_downtime=0.001, max_rounds=3)
    assert decisions(policy, [90 * MIB, 60 * MIB, 30 * MIB]) == [Decision.CONTINUE, Decision.CONTINUE, Decision.STALLED]


def test_workload_is_throttled_in_steps_before_a_stall() -> None:
    policy = Convergence(max_downtime=0.1, max_rounds=30, throttles=2)
    assert decisions(policy, [50 * MIB] * (3 + STALL_ROUNDS)) == [
        Decision.CONTINUE,
        Decision.THROTTLE,
        Decision.THROTTLE,
        *[Decision.CONTINUE] * (STALL_ROUNDS - 1),
        Decision.STALLED,
    ]


def test_converging_workload_is_not_throttled() -> None:
    policy = Convergence(max_downtime=0.1, max_rounds=30, throttles=2)
    assert decisions(policy, [50 * MIB, 40 * MIB, 30 * MIB, 9 * MIB])[-2:] == [Decision.CONTINUE, Decision.SWITCH_OVER]
    assert policy.throttles == 2


def test_bandwidth_is_smoothed_from_the_first_round_with_data() -> None:
    policy = Convergence(max_downtime=0.1, max_rounds=30)
    policy.after_round(0, 0.001, 50 * MIB)
    assert policy.expected_downtime(MIB) == float("inf")
    policy.after_round(100 * MIB, 1.0, 50 * MIB)
    assert policy.bandwidth == 100 * MIB
    policy.after_round(50 * MIB, 1.0, 50 * MIB)
    assert 50 * MIB < policy.bandwidth < 100 * MIB


def test_budget_bounds_the_transfer_at_any_dirty_rate() -> None:
    policy = Convergence(max_downtime=0.1, max_rounds=30, budget=2.0)
    assert decisions(policy, [51 * MIB]) == [Decision.STALLED]
    policy = Convergence(max_downtime=0.1, max_rounds=30, budget=2.0)
    assert policy.after_round(100 * MIB, 1.0, 40 * MIB) is Decision.CONTINUE
    assert policy.after_round(40 * MIB, 0.4, 30 * MIB) is Decision.CONTINUE
    assert policy.after_round(30 * MIB, 0.3, 20 * MIB) is Decision.STALLED
    # The sum of the bytes sent and of the bytes remaining is at most twice the memory.
    assert policy.covered + 20 * MIB <= 200 * MIB


def test_stall_is_predicted_during_the_first_round() -> None:
    policy = Convergence(max_downtime=0.1, max_rounds=30, budget=1.8)
    assert not policy.will_stall(100 * MIB, 50 * MIB, 0.5, 40 * MIB)
    assert policy.will_stall(100 * MIB, 50 * MIB, 0.5, 41 * MIB)
    # The remaining pages fit the downtime at the current bandwidth.
    assert not policy.will_stall(100 * MIB, 50 * MIB, 0.1, 41 * MIB)
    assert not Convergence(max_downtime=0.1, max_rounds=30).will_stall(100 * MIB, 90 * MIB, 0.9, 90 * MIB)


@pytest.mark.parametrize("max_downtime", [0.0, 0.3, 10.0])
@given(rounds=st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(0, 1e4), st.integers(0, 1 << 40)), max_size=60))
def test_policy_terminates_and_respects_max_downtime(max_downtime: float, rounds: list[tuple[int, float, int]]) -> None:
    policy = Convergence(max_downtime=max_downtime, max_rounds=20)
    for number, (covered, seconds, remaining) in enumerate(rounds, 1):
        decision = policy.after_round(covered, seconds, remaining)
        if decision is Decision.SWITCH_OVER:
            assert policy.expected_downtime(remaining) <= max_downtime
        if decision is not Decision.CONTINUE:
            return
        assert number < 20
