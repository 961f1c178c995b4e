"""Pre-copy: rounds of copying while the workload runs, until the policy decides to switch over (S2)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from pageferry._engine import PageSet
from pageferry.errors import NotConverging
from pageferry.host.fault_points import fault_point
from pageferry.memory.regions import SMALL_PAGE
from pageferry.migration import switchover_request
from pageferry.migration.convergence import HYBRID_BUDGET, NO_DISKS, Convergence, Decision
from pageferry.migration.options import Options
from pageferry.migration.rounds import Round, Rounds, count, subtract, union
from pageferry.migration.session import Session
from pageferry.migration.throttle import STEPS
from pageferry.migration.write_trace import WriteTrace

OWN_LIMIT = 1.25
"""Maximum ratio of the user's bandwidth limit to the measured rate at which an error names the limit as the cause."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Pages whose current contents have not been sent when the workload is about to be paused."""

    pages: list[PageSet]
    postcopy: bool
    """Whether the pages are sent after the switch-over (post-copy)."""


class Precopy:
    """Rounds of a migration while the workload runs, in `precopy` and `hybrid` mode."""

    def __init__(self, session: Session, trace: WriteTrace, rounds: Rounds) -> None:
        options = session.job.options
        self._session = session
        self._trace = trace
        self._rounds = rounds
        self._hybrid = options.mode == "hybrid"
        self._requests = session.job.folder if self._hybrid else None
        """Directory in which a switch to post-copy can be requested."""
        self._convergence = convergence_of(options)
        self._wire = 0.0
        """Highest rate of a round so far, bytes on the wire per second."""

    async def run(self) -> Rest:
        """Send all pages in round 1, and in each further round those modified since, until the policy decides to
        switch over. Return the pages that are left.

        Raises NotConverging.
        """
        with contextlib.ExitStack() as stack:
            if self._requests is not None:
                stack.enter_context(switchover_request.listening(self._requests))
            pages = self._session.memory.page_sets(full=True)
            while True:
                sent = await self._rounds.send(pages, self._stops_early if self._hybrid else None)
                if not any(sent.left):
                    self._session.deferred = None  # round 1 has loaded all pages
                fault_point("source.between-rounds")
                pages = await self._collect_after(sent)
                if self._session.disks is not None:
                    await self._await_disks(sent, pages)
                if (rest := await self._after(sent, pages)) is not None:
                    return rest

    async def _collect_after(self, sent: Round) -> list[PageSet]:
        """Return the pages to send after a round, and complete the figures of the round."""
        pages = await self._trace.collect()
        self._session.drains.due = True
        sent.modified = count(pages)
        sent.remaining = count(union(pages, sent.left))
        self._rounds.measure(sent)
        return pages

    async def _await_disks(self, sent: Round, pages: list[PageSet]) -> None:
        """Wait until the disks have been copied, and add the pages that were modified during the wait to `pages`:
        further rounds during the copies would only send the same pages again."""
        self._wire = max(self._wire, sent.transferred.sent / sent.seconds)
        await self._session.disks_copied(self._wire)
        sent.remaining = count(union(pages, await self._trace.collect()))

    async def _after(self, sent: Round, pages: list[PageSet]) -> Rest | None:
        """Report the round, and decide how to continue. Return the remaining pages for a switch-over, or None for
        another round. Raises NotConverging."""
        remaining = sent.remaining * SMALL_PAGE
        disks = await self._session.disks.rest(self._wire) if self._session.disks is not None else NO_DISKS
        decision = self._convergence.after_round(sent.transferred.covered, sent.seconds, remaining, disks)
        self._rounds.report(sent)
        if self._switch_requested() or (decision is Decision.STALLED and self._hybrid):
            return Rest(pages, postcopy=True)
        match decision:
            case Decision.SWITCH_OVER:
                return Rest(pages, postcopy=False)
            case Decision.STALLED:
                raise self._not_converging(remaining, sent.seconds, disks)
            case Decision.THROTTLE:
                await self._tighten_throttle()
            case Decision.CONTINUE:
                pass
        return None

    async def _stops_early(self, sent: Round) -> bool:
        """Return whether a hybrid migration need not complete this round, because a switch to post-copy was requested
        or the round is certain to end in a stall."""
        return self._switch_requested() or (sent.number == 1 and await self._will_stall(sent))

    async def _will_stall(self, sent: Round) -> bool:
        again = await self._trace.peek()
        subtract(again, sent.left)
        total = self._session.memory.size // SMALL_PAGE
        self._rounds.measure(sent)
        return self._convergence.will_stall(total, total - count(sent.left), sent.seconds, count(again))

    def _switch_requested(self) -> bool:
        return self._requests is not None and switchover_request.requested(self._requests)

    async def _tighten_throttle(self) -> None:
        throttle = self._session.throttle
        assert throttle is not None
        if not await throttle.tighten():
            self._convergence.throttles = 0
        self._session.statistics.cpu_throttle_percentage = throttle.highest
        fault_point("source.throttled")

    def _not_converging(self, remaining: int, seconds: float, disks: tuple[int, float]) -> NotConverging:
        """Return the error after a round that took `seconds` seconds and left `remaining` bytes of memory. `disks`: as
        for `Convergence.after_round`."""
        job, convergence = self._session.job, self._convergence
        expected = convergence.expected_downtime(remaining) + disks[1]
        slower = "" if job.options.auto_converge else ", throttle the workload with `auto_converge`"
        rate, limit = convergence.bandwidth, job.options.bandwidth
        own = 0 < limit <= OWN_LIMIT * rate
        taken = (
            f"`bandwidth` allows {limit / 2**20:.0f}"
            if own
            else f"{self._session.statistics.peer} takes {rate / 2**20:.0f}"
        )
        faster = "raise `bandwidth`, allow" if own else "allow"
        return NotConverging(
            f"cannot complete the migration of {job.workload.name}: the workload modifies "
            f"{remaining / seconds / 2**20:.0f} MiB/s and {taken} MiB/s; {remaining >> 20} MiB "
            f"{f'and {disks[0] >> 20} MiB of its disks ' if disks[0] else ''}remain after "
            f"{convergence.rounds} rounds, and the workload stays on this host; {faster} `max_downtime` "
            f"{expected * 1e3:.0f}ms{slower}, or use post-copy with `mode` hybrid"
        )


def convergence_of(options: Options) -> Convergence:
    """Return the policy for these options."""
    budget = HYBRID_BUDGET if options.mode == "hybrid" else float("inf")
    throttles = len(STEPS) if options.auto_converge else 0
    return Convergence(options.max_downtime, options.max_rounds, budget, throttles)
