"""Write traces of a migration: the pages that the workload has modified since they were last collected (S2)."""

from __future__ import annotations

from pageferry._engine import PageSet, Trace
from pageferry.memory.view import Memory
from pageferry.migration.engine_call import off_loop
from pageferry.migration.source_memory import SourceMemory
from pageferry.migration.statistics import MigrationStatistics
from pageferry.workloads.deferred_access import AcquiredPager


class WriteTrace:
    """Write traces of a running workload. `remove` removes them, or the kernel when this process exits."""

    def __init__(self, trace: Trace, memory: SourceMemory, statistics: MigrationStatistics) -> None:
        self._trace: Trace | None = trace
        self._statistics = statistics
        self.hot = memory.page_sets()
        """Pages that were modified since the traces were installed, by region."""

    @classmethod
    async def install(
        cls, memory: SourceMemory, statistics: MigrationStatistics, hold: AcquiredPager | None
    ) -> WriteTrace:
        """Install the traces in a helper thread. The workload is not stopped.

        `hold`: acquired pager of a workload with deferred memory, which lends its userfaultfd; otherwise None.
        """
        if not isinstance(memory, Memory):
            trace = await off_loop(memory.install_trace)
        elif hold is None:
            large, release_after = memory.collapsible(list(statistics.large)), statistics.options.release_after
            trace = await off_loop(lambda: Trace(memory.segments, release_after, large))
        else:
            trace = await off_loop(lambda: Trace(memory.segments, userfaults=hold.userfaults))
        statistics.install_seconds = trace.install_seconds
        return cls(trace, memory, statistics)

    async def collect(self) -> list[PageSet]:
        """Return the pages modified since the last collection. The pages are write-protected again before their
        contents are sent."""
        trace, dirty = self._installed, self._empty()
        await off_loop(lambda: trace.collect(dirty))
        self._statistics.collections += 1
        for hot, new in zip(self.hot, dirty, strict=True):
            hot.update(new)
        return dirty

    async def peek(self) -> list[PageSet]:
        """Return the pages that `collect` would return. A later `collect` returns them too."""
        trace, dirty = self._installed, self._empty()
        await off_loop(lambda: trace.peek(dirty))
        return dirty

    async def remove(self) -> None:
        """Remove the traces. May be called twice."""
        if self._trace is not None:
            trace, self._trace = self._trace, None
            self._statistics.released_units = trace.released_units
            await off_loop(trace.remove)

    @property
    def _installed(self) -> Trace:
        if self._trace is None:
            raise RuntimeError("cannot use the write traces: they have been removed")
        return self._trace

    def _empty(self) -> list[PageSet]:
        return [PageSet(region.pages) for region in self.hot]
