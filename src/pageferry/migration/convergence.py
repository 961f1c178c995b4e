"""When to stop copying and switch over (S2): a policy of a few lines, apart from everything that moves bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

SMOOTHING = 0.5
"""Weight of the newest round in the bandwidth estimate."""
STALL_ROUNDS = 4
"""So many rounds in a row without progress are a stall."""
HYBRID_BUDGET = 1.8
"""With post-copy to fall back on, nothing is sent more than so many times on average. Less than twice, because a
round may leave more than the one before it."""
PROGRESS = 0.9
"""A round makes progress when it leaves less than this part of the least that was ever left."""


class Decision(Enum):
    """What comes after a round."""

    CONTINUE = "continue"
    SWITCH_OVER = "switch-over"
    THROTTLE = "throttle"
    """Slow the workload down by a further step, and continue."""
    STALLED = "stalled"


@dataclass(slots=True)
class Convergence:
    """Looks at what each round left over.

    Switches over when the rest can be sent within `max_downtime` seconds at the bandwidth measured, and gives up when
    `max_rounds` rounds have not brought it there, or when `STALL_ROUNDS` rounds in a row brought it no nearer.
    """

    max_downtime: float
    """Seconds that sending the rest may take while the workload is paused."""
    max_rounds: int
    budget: float = float("inf")
    """A further round is only begun where all that is sent stays below so many times what the first one sent, even if
    everything of that round has to be sent once more. Otherwise that is a stall too."""
    throttles: int = 0
    """So many times the workload can be slowed down: after each round that brought the rest no nearer."""
    bandwidth: float = 0.0
    """Bytes of memory per second, smoothed. Counts memory covered, not bytes sent: zeros and compression help."""
    rounds: int = 0
    stalled: int = 0
    least: float = field(default=float("inf"))
    first: int = 0
    covered: int = 0
    """Bytes of memory that the first round has sent, and all of them together."""

    def after_round(self, covered: int, seconds: float, remaining: int) -> Decision:
        """`covered` bytes of memory were sent in `seconds`; `remaining` bytes were modified meanwhile."""
        self.rounds += 1
        self._measure(covered, seconds)
        self.first = self.first or covered
        self.covered += covered
        if self.expected_downtime(remaining) <= self.max_downtime:
            return Decision.SWITCH_OVER
        self.stalled = 0 if remaining < self.least * PROGRESS else self.stalled + 1
        self.least = min(self.least, remaining)
        if self.stalled and self.throttles and self.rounds < self.max_rounds:
            self.throttles, self.stalled = self.throttles - 1, 0
            return Decision.THROTTLE
        over_budget = self.covered + 2 * remaining > self.budget * self.first
        if self.stalled >= STALL_ROUNDS or self.rounds >= self.max_rounds or over_budget:
            return Decision.STALLED
        return Decision.CONTINUE

    def is_hopeless(self, total: int, covered: int, seconds: float, again: int) -> bool:
        """In the first round, of `total` bytes: whether what it will leave is certain to be a stall by then. `again`
        bytes of the `covered` ones have been modified already, and that does not become less."""
        left_in_time = again * seconds <= self.max_downtime * covered
        return not left_in_time and total + 2 * again > self.budget * total

    def expected_downtime(self, remaining: int) -> float:
        """Seconds that sending `remaining` bytes of memory will take."""
        if remaining == 0:
            return 0.0
        return remaining / self.bandwidth if self.bandwidth else float("inf")

    def _measure(self, covered: int, seconds: float) -> None:
        # Short rounds measure the latency of the link and not its bandwidth.
        if covered and seconds > 0:
            latest = covered / seconds
            self.bandwidth = latest if not self.bandwidth else SMOOTHING * latest + (1 - SMOOTHING) * self.bandwidth
