"""Memory of a workload at the destination, with the parts of the engine that receive and place its pages."""

from __future__ import annotations

from collections.abc import Sequence

from pageferry._engine import BlockReceiver, Placer, TargetRegion
from pageferry.errors import ProtocolError
from pageferry.memory.regions import LARGE_PAGE
from pageferry.memory.view import Memory
from pageferry.migration import preallocate
from pageferry.migration.incoming import Incoming
from pageferry.migration.transport import messages
from pageferry.migration.transport.connection import PageStream

POPULATE_WORKERS = 1
"""Number of threads that map complete units during the transfer. One suffices: mapping is much faster than
receiving."""


class Placement:
    """Places received pages in the memory of the workload."""

    def __init__(self, memory: Memory, large: list[list[bool]], placer: Placer, receiver: BlockReceiver) -> None:
        self.memory = memory
        self.large = large
        """Whether each 2 MiB unit of each region is backed by a huge page at the source."""
        self.placer = placer
        self.receiver = receiver

    @classmethod
    async def open(cls, incoming: Incoming, memory: Memory, streams: Sequence[PageStream], timeout: float) -> Placement:
        """Receive the LargePages messages, and prepare the memory for these huge pages and for the page streams. Raises
        MigrationError, WorkloadError."""
        hello, channel = incoming.hello, incoming.channel
        large = [await _large_pages(incoming, memory) for _ in hello.regions]
        if hello.keep_large:
            await channel.during(preallocate.compact(memory.regions, large))
        placer = Placer(
            [
                TargetRegion(mapping, region.page_size, units)
                for mapping, region, units in zip(memory.mappings, memory.regions, large, strict=True)
            ],
            memory.segments,
            keep_large=hello.keep_large,
            workers=POPULATE_WORKERS if hello.populate == "all" else 0,
        )
        if hello.keep_large and hello.mode == "postcopy":
            await channel.during(preallocate.allocate(placer, large))
        return cls(memory, large, placer, BlockReceiver([stream.handle for stream in streams], placer, timeout))

    def populated(self) -> messages.Populated:
        """Return the numbers of page-table entries populated so far, and the time spent."""
        done = self.placer.populated
        return messages.Populated(large=done.large, small=done.small, failed=done.failed, seconds=done.seconds)

    def close(self) -> None:
        """Cancel receiving, and release the objects of the engine at once: an exception may keep a reference to this
        object."""
        self.receiver.cancel()
        del self.placer, self.receiver


async def _large_pages(incoming: Incoming, memory: Memory) -> list[bool]:
    message = await incoming.receive_one(messages.LargePages)
    return units_of(memory, message)


def units_of(memory: Memory, message: messages.LargePages | messages.Hot) -> list[bool]:
    """Return, for each unit of the region, whether the bitmap in a message contains it. Raises ProtocolError if the
    bitmap does not match the region."""
    try:
        return messages.unpack_units(message.units, -(-memory.regions[message.region].length // LARGE_PAGE))
    except ValueError as error:
        raise ProtocolError(f"the peer sent an invalid bitmap of units of region {message.region}: {error}") from error
