"""Convergence policy of pre-copy: decides after each round to continue, throttle, switch over or fail (S2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

SMOOTHING = 0.5
"""Weight of the newest round in the bandwidth estimate."""
STALL_ROUNDS = 4
"""Number of consecutive rounds without progress that count as a stall."""
HYBRID_BUDGET = 1.8
"""Budget of a hybrid migration: number of times that each byte may be sent on average before the migration switches to
post-copy. It is less than 2, because a round may leave more than the previous one."""
NO_DISKS = (0, 0.0)
"""Remaining bytes and seconds of a migration that copies no disks."""
PROGRESS = 0.9
"""Fraction of the lowest remainder so far. A round makes progress if it leaves less than this."""


class Decision(Enum):
    """Next step after a round."""

    CONTINUE = "continue"
    SWITCH_OVER = "switch-over"
    THROTTLE = "throttle"
    """Apply the next throttle step, then continue."""
    STALLED = "stalled"


@dataclass(slots=True)
class Convergence:
    """Policy that decides after each round from the number of bytes left to send.

    The policy switches over if the remaining bytes can be sent within `max_downtime` seconds at the measured bandwidth.
    It reports a stall after `max_rounds` rounds, after `STALL_ROUNDS` consecutive rounds without progress, or if
    sending all remaining pages twice could exceed the budget.
    """

    max_downtime: float
    """Maximum expected time for sending the remaining bytes while the workload is paused, seconds."""
    max_rounds: int
    budget: float = float("inf")
    """Maximum number of bytes to send, as a multiple of the bytes of the first round."""
    throttles: int = 0
    """Number of throttle steps left. One is applied after each round without progress."""
    bandwidth: float = 0.0
    """Smoothed bandwidth, bytes of memory covered per second. Zero pages and compression raise it, because the bytes
    sent do not count."""
    rounds: int = 0
    stalled: int = 0
    least: float = field(default=float("inf"))
    """Lowest number of bytes that a round has left so far."""
    first: int = 0
    """Bytes of memory covered by the first round."""
    covered: int = 0
    """Bytes of memory covered by all rounds together."""

    def after_round(
        self, covered: int, seconds: float, remaining: int, disks: tuple[int, float] = NO_DISKS
    ) -> Decision:
        """Return the decision after a round that covered `covered` bytes of memory in `seconds` seconds and left
        `remaining` bytes to send. `disks`: bytes of disks left to copy, and the expected time to copy them, seconds."""
        self.rounds += 1
        self._measure(covered, seconds)
        self.first = self.first or covered
        self.covered += covered
        more, more_seconds = disks
        if self.expected_downtime(remaining) + more_seconds <= self.max_downtime:
            return Decision.SWITCH_OVER
        left = remaining + more
        self.stalled = 0 if left < self.least * PROGRESS else self.stalled + 1
        self.least = min(self.least, left)
        if self.stalled and self.throttles and self.rounds < self.max_rounds:
            self.throttles, self.stalled = self.throttles - 1, 0
            return Decision.THROTTLE
        over_budget = self.covered + 2 * remaining > self.budget * self.first
        if self.stalled >= STALL_ROUNDS or self.rounds >= self.max_rounds or over_budget:
            return Decision.STALLED
        return Decision.CONTINUE

    def will_stall(self, total: int, covered: int, seconds: float, again: int) -> bool:
        """Return whether the first round, of `total` bytes, is certain to end in a stall, once it has covered `covered`
        bytes in `seconds` seconds. `again`: number of the covered bytes that have been modified since they were sent;
        it can only increase."""
        left_in_time = again * seconds <= self.max_downtime * covered
        return not left_in_time and total + 2 * again > self.budget * total

    def expected_downtime(self, remaining: int) -> float:
        """Return the expected time for sending `remaining` bytes of memory, seconds."""
        if remaining == 0:
            return 0.0
        return remaining / self.bandwidth if self.bandwidth else float("inf")

    def _measure(self, covered: int, seconds: float) -> None:
        # It is smoothed, because a short round measures the latency of the link rather than its bandwidth.
        if covered and seconds > 0:
            latest = covered / seconds
            self.bandwidth = latest if not self.bandwidth else SMOOTHING * latest + (1 - SMOOTHING) * self.bandwidth
