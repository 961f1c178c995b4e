"""Last step at the destination before Ready: loads the device state, and populates the page tables."""

from __future__ import annotations

from logging import getLogger

from pageferry.errors import PageferryError
from pageferry.memory.regions import LARGE_PAGE
from pageferry.migration.engine_call import off_loop
from pageferry.migration.incoming import Incoming
from pageferry.migration.postcopy_destination import PostcopyMemory
from pageferry.migration.transfer import Transfer
from pageferry.migration.transport import messages

log = getLogger(__name__)


class Loading:
    """Step that loads the state of a workload whose pages were received, and populates its page tables (S1, S5)."""

    def __init__(self, incoming: Incoming, transfer: Transfer) -> None:
        self._incoming = incoming
        self._transfer = transfer

    async def run(self, state: bytes) -> messages.Ready:
        """Load the state, and populate page tables. Return the Ready message."""
        times, channel = self._incoming.times, self._incoming.channel
        times.phase("load")
        with times.measure("load"):
            await channel.during(self._load(state))
        times.phase("populate")
        with times.measure("populate"):
            await channel.during(self._populate())
        return messages.Ready(
            load=times.seconds("load"),
            populate=times.seconds("populate"),
            populated=self._transfer.placement.populated(),
        )

    async def _load(self, state: bytes) -> None:
        await self._transfer.prepared()
        await self._incoming.workload.load_state(state)

    async def _populate(self) -> None:
        mode, hot, placer = self._incoming.hello.populate, self._transfer.hot, self._transfer.placement.placer
        if (postcopy := self._transfer.postcopy) is not None:
            await self._populate_present(postcopy)
            return
        for region, units in hot.items():
            await off_loop(lambda region=region, units=units: placer.populate(region, units))  # type: ignore[misc]
        try:
            await off_loop(lambda: placer.finish(populate_rest=mode == "all"))
        except PageferryError as error:
            log.warning("page-table entries are created on first access: %s", error)
        if mode != "none" and not self._transfer.placement.is_clone:  # pages of a clone are mapped on first access
            await self._prefault(hot if mode == "hot" else None)

    async def _populate_present(self, postcopy: PostcopyMemory) -> None:
        """Populate the page tables of the pages that are present (post-copy)."""
        if self._incoming.hello.populate != "none":
            await postcopy.populate()
            await self._prefault(self._whole_units())

    def _whole_units(self) -> dict[int, list[int]]:
        """Return the units, per region, that are backed by huge pages and whose pages are all present."""
        missing = [pages.unit_counts() for pages in self._transfer.missing.sets]
        large = self._transfer.placement.memory.large_units()
        return {
            region: [unit for unit, count in enumerate(counts) if not count and large[region][unit]]
            for region, counts in enumerate(missing)
        }

    async def _prefault(self, units: dict[int, list[int]] | None) -> None:
        """Populate the second-stage page tables of the hypervisor. They are filled from the page tables of the process,
        which must be populated first."""
        try:
            await self._incoming.workload.prefault(units)
        except (PageferryError, OSError) as error:
            log.warning("second-stage page-table entries are created on first access: %s", error)


async def populate_cold(transfer: Transfer) -> None:
    """Populate the page tables of all units except those in `hot`, while the workload runs (S1)."""
    placement = transfer.placement
    for region, hot in transfer.hot.items():
        units = range(-(-placement.memory.regions[region].length // LARGE_PAGE))
        cold = sorted(set(units).difference(hot))
        await off_loop(lambda region=region, cold=cold: placement.placer.populate(region, cold))  # type: ignore[misc]
